"""Where runs take place: GPUs, or the machine without, and how much of them other processes use."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from deepspeed.accelerator import get_accelerator

from agsel.errors import UserError
from tools.comparison.plan import Run

IDLE_BYTES = 2**28
"""What a driver may hold on a GPU that nobody uses."""
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Gpu:
    """A GPU at the start of the comparison.

    Attributes:
        index: as the driver counts.
        total: bytes.
        used: bytes, by other processes.
    """

    index: str
    total: int
    used: int


@dataclass
class Place:
    """GPUs that runs share, or a machine without.

    Attributes:
        gpus: as the driver counts; none on the CPU.
        capacity: free bytes of the fullest one.
        running: by the number of their slot.
    """

    gpus: tuple[str, ...]
    capacity: float
    running: dict[int, Run] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Of a run: its GPUs, counted as the driver does."""
        if not self.gpus:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def find_gpus() -> list[Gpu]:
    """Those that are there and visible; none where DeepSpeed uses the CPU.

    Raises:
        UserError: the driver's own program says nothing of them.
    """
    if get_accelerator().device_name() == "cpu" or not torch.cuda.is_available():
        return []
    asked = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"nvidia-smi says nothing of the GPUs, {error}: mend it, or set DS_ACCELERATOR=cpu") from error
    return visible(answer, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(answer: str, named: str | None) -> list[Gpu]:
    """The GPUs in nvidia-smi's answer that CUDA_VISIBLE_DEVICES names, by number or UUID; all, if it is not set.

    Raises:
        UserError: one is not in the answer, as a part of a GPU, or has no memory of its own.
    """
    gpus = {}
    for line in answer.splitlines():
        index, uuid, total, used = (word.strip() for word in line.split(","))
        if not (total.isdigit() and used.isdigit()):
            raise UserError(f"nvidia-smi says nothing of the memory of GPU {index}: set DS_ACCELERATOR=cpu")
        gpus[index] = gpus[uuid] = Gpu(index, int(total) * MEBIBYTE, int(used) * MEBIBYTE)
    names = list(gpus) if named is None else [name.strip() for name in named.split(",")]
    unknown = next((name for name in names if name not in gpus), None)
    if unknown is not None:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES names {unknown!r}, and nvidia-smi knows {', '.join(gpus)}: name some of these"
        )
    return list(dict.fromkeys(gpus[name] for name in names))


def places(gpus: Sequence[Gpu], gpus_per_run: int) -> list[Place]:
    """Neighbouring GPUs together, as many as a run takes; GPUs that are left over stay idle.

    Raises:
        UserError: there are too few.
    """
    if not gpus:
        return [Place((), math.inf)]
    if len(gpus) < gpus_per_run:
        raise UserError(f"gpus_per_run is {gpus_per_run}, and there are {len(gpus)} GPUs: lower it")
    groups = [gpus[first : first + gpus_per_run] for first in range(0, len(gpus) - gpus_per_run + 1, gpus_per_run)]
    return [Place(tuple(gpu.index for gpu in group), min(gpu.total - gpu.used for gpu in group)) for group in groups]


def said_of_others(gpus: Sequence[Gpu]) -> list[str]:
    """A line for each GPU that other processes use."""
    return [
        f"note      GPU {gpu.index}: other processes use {gpu.used / 1e9:.1f} of its {gpu.total / 1e9:.1f} GB; runs "
        "share the rest, and their times say little"
        for gpu in gpus
        if gpu.used > IDLE_BYTES
    ]
