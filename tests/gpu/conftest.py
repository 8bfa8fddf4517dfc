"""GPU tests skip themselves without enough GPUs, and run the rank scripts on CUDA with NCCL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed import RANKS, SHARED_GPU


@pytest.fixture(scope="session", autouse=True)
def on_gpus() -> Iterator[None]:
    needed = 1 if SHARED_GPU else RANKS
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} GPUs, found {torch.cuda.device_count()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGSEL_TEST_DEVICE", "cuda")
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if SHARED_GPU:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent / "shared_gpu"), prepend=os.pathsep)
        yield
