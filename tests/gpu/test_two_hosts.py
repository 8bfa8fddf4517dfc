"""Two hosts of one GPU each, as torchrun sees them: a rank is killed, and the run ends as an unbroken one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import REPOSITORY, environment, free_port, launch
from tests.live_run import ANNOUNCING_TRAIN
from tests.tiny_run import TRAIN, save_model, save_rows, settings

RANK_TIMEOUT = 20
STEPS = 12


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a data file."""
    folder = tmp_path_factory.mktemp("parts")
    return save_model(folder / "model"), save_rows(folder / "rows.jsonl", 32)


def run_of(parts: tuple[Path, Path], folder: Path) -> list[str]:
    limits: dict[str, Any] = {"rank_timeout": RANK_TIMEOUT, "ddp_timeout": 60}
    return settings(*parts, folder, bf16="true", max_steps=STEPS, save_strategy="steps", save_steps=4, **limits)


def agents(log: Path, *script: str | Path) -> list[subprocess.Popen[bytes]]:
    """An agent of torchrun for each host, which sees the GPU of its own."""
    port = str(free_port())
    started = []
    for node in range(2):
        place = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), "--master-addr", "127.0.0.1"]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *place, "--master-port", port, *map(str, script)],
                env=environment() | {"CUDA_VISIBLE_DEVICES": str(node)},
                cwd=REPOSITORY,
                stdout=log.open("ab"),
                stderr=subprocess.STDOUT,
            )
        )
    return started


def test_a_killed_rank_ends_both_hosts_and_the_run_goes_on(parts: tuple[Path, Path], tmp_path: Path) -> None:
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert launch(TRAIN, *run_of(parts, whole), ranks=2).returncode == 0
    both = agents(log, ANNOUNCING_TRAIN, "step 7", "3", *run_of(parts, run))
    found = None
    while found is None:
        assert all(agent.poll() is None for agent in both), log.read_text()[-4000:]
        time.sleep(0.1)
        found = re.search(r"^PHASE 1 (\d+) step 7$", log.read_text(), re.M)
    os.kill(int(found[1]), signal.SIGKILL)
    assert 0 not in [agent.wait(RANK_TIMEOUT + 60) for agent in both], log.read_text()[-4000:]

    log.write_text("")
    resumed = agents(log, TRAIN, *run_of(parts, run), "--resume_from_checkpoint", "auto")
    assert [agent.wait(300) for agent in resumed] == [0, 0], log.read_text()[-4000:]
    assert "checkpoint-4, every file verified" in log.read_text()
    expected, trained = (load_file(folder / "model" / "model.safetensors") for folder in (whole, run))
    assert trained.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(trained[name], weight), name
