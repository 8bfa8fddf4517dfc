"""The process group of DeepSpeed's ZeRO optimizers, for which it has no public function."""

from __future__ import annotations

from deepspeed.utils import groups
from torch.distributed import ProcessGroup

from agsel import upstream


def data_parallel_group() -> ProcessGroup:
    """The group over which ZeRO partitions. DeepSpeed makes it now if there is no engine yet.

    Raises:
        RunError: this DeepSpeed differs from the tested one here.
    """
    upstream.require_tested(__name__)
    return groups._get_data_parallel_group()
