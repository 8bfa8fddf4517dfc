"""GPU tests skip themselves without enough GPUs, and run the rank scripts on CUDA with NCCL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.distributed import RANKS


@pytest.fixture(scope="session", autouse=True)
def on_gpus() -> Iterator[None]:
    if torch.cuda.device_count() < RANKS:
        pytest.skip(f"needs {RANKS} GPUs, found {torch.cuda.device_count()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGSEL_TEST_DEVICE", "cuda")
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        yield
