"""The process group of DeepSpeed's ZeRO optimizers, for which it has no public function."""

from __future__ import annotations

from deepspeed.utils import groups
from torch.distributed import ProcessGroup


def data_parallel_group() -> ProcessGroup:
    """The group over which ZeRO partitions. DeepSpeed makes it now if there is no engine yet."""
    return groups._get_data_parallel_group()
