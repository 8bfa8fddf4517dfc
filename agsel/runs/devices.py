"""Which GPU each rank uses. NCCL refuses two ranks on one only when all have met, and in words of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from agsel.errors import UserError


def own_device() -> str:
    """The UUID of the GPU that LOCAL_RANK names; empty if this process sees fewer."""
    index = int(os.environ["LOCAL_RANK"])
    return str(torch.cuda.get_device_properties(index).uuid) if index < torch.cuda.device_count() else ""


def require_device_each(hosts: Sequence[str], devices: Sequence[str]) -> None:
    """Refuse ranks that have no GPU of their own.

    Args:
        hosts: of each rank, with what tells hosts of one name apart before it.
        devices: its GPU there, as `own_device` says.

    Raises:
        UserError: a host has more ranks than GPUs.
    """
    for host in dict.fromkeys(hosts):
        own = [device for place, device in zip(hosts, devices, strict=True) if place == host]
        gpus = len({*own} - {""})
        if gpus < len(own):
            said = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
            raise UserError(
                f"{len(own)} processes on host {host.split()[-1]} see {said}: start one for each, as with --num_gpus "
                f"{max(1, gpus)}"
            )
