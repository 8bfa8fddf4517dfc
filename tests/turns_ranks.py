"""Ranks take turns of which the first is longer than a collective may take; each says when it has its own."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from agsel.runs.turns import in_turns

LONGEST_COLLECTIVE = timedelta(seconds=2)

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=LONGEST_COLLECTIVE)
    with in_turns():
        print(f"begins {dist.get_rank()}", flush=True)
        if dist.get_rank() == 0:
            time.sleep(2 * LONGEST_COLLECTIVE.total_seconds())
        print(f"ends {dist.get_rank()}", flush=True)
    dist.destroy_process_group()
