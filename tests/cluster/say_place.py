"""Join the ranks and say what each of them knows then: `mpirun -n 2 python tests/cluster/say_place.py PATIENCE`."""

import os
import sys

import torch
import torch.distributed as dist

from agsel.runs.ranks import ends_in_one_line, join_ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

if __name__ == "__main__":
    with ends_in_one_line():
        join_ranks(patience=float(sys.argv[1]))
        number = torch.ones(1)
        dist.all_reduce(number)
        said = " ".join(f"{name}={os.environ[name]}" for name in NAMES)
        sys.stdout.write(f"PLACE {int(number)} ranks {said}\n")
        sys.stdout.flush()
        dist.destroy_process_group()
