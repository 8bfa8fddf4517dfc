"""The exported model on a disk that does not take it; what is in it is compared in test_launch.py."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from agsel.runs.checkpoints import PROBE
from agsel.training.export import export_model
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_rank")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process can grow beyond this many bytes: a write then fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_model_that_finds_no_room_is_named_and_leaves_the_one_before(tmp_path: Path) -> None:
    def trainer_of(seed: int) -> Trainer:
        arguments = TrainingArguments(output_dir=str(tmp_path / "model"), use_cpu=True, report_to="none")
        return Trainer(tiny_model(intermediate=4000, seed=seed), arguments)

    folder = tmp_path / "model"
    export_model(trainer_of(seed=1), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with files_up_to(PROBE - 1), pytest.raises(RuntimeError, match="could not be written") as refusal:
        export_model(trainer_of(seed=2), folder)
    assert f"{folder} (File too large; " in str(refusal.value)
    assert "--resume_from_checkpoint auto" in str(refusal.value)
    assert list(tmp_path.iterdir()) == [folder]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    export_model(trainer_of(seed=2), folder)
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = tiny_model(intermediate=4000, seed=2).state_dict()
    assert all(torch.equal(weights[name], own) for name, own in expected.items())
