"""More processes than GPUs: a user's mistake, told in one line, whatever NCCL would say of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from tests.distributed import launch
from tests.tiny_run import TRAIN, save_model, save_rows, settings

SHARED = Path(__file__).parent / "shared_gpu"


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user, without what lets other tests share a GPU."""
    path = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place != str(SHARED)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    gpus = torch.cuda.device_count()
    run = settings(save_model(tmp_path / "model"), save_rows(tmp_path / "rows.jsonl", 8), tmp_path / "run", bf16="true")
    done = launch(TRAIN, *run, ranks=gpus + 1)
    assert done.returncode != 0
    (said,) = re.findall("^agsel: error: .*", done.stdout, re.M)
    assert said.startswith(f"agsel: error: {gpus + 1} processes on host ")
    assert said.endswith(f": start one for each, as with --num_gpus {gpus}")
    assert "Traceback" not in done.stdout, done.stdout[-4000:]
