"""agsel in a plain `transformers.Trainer`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

import agsel
from agsel.training import add_selection
from tests.distributed import REPOSITORY, launch_worker
from tests.tiny import tiny_batch, tiny_model


def test_a_plain_trainer_trains_the_selected_blocks_with_its_own_settings(tmp_path: Path) -> None:
    output = launch_worker(REPOSITORY / "tests" / "trainer_worker.py", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    steps = result["steps"]
    assert len(steps) == 6
    for number, step in enumerate(steps):
        assert step["changed"] == sorted(step["selected"])
        assert len(step["selected"]) == 2
        assert step["rates"] == pytest.approx([1e-2 * (6 - number) / 6] * 4), "the schedule acts on every group"
    assert result["adam"] == {"betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1, "fused": True}
    assert result["hooks"] == 0, "nothing drags the backward below the lowest selected block"
    assert json.loads((tmp_path / "selection.json").read_text())["steps"] == 6
    assert "step 6/6  loss " in output


def test_a_trainer_without_deepspeed_and_a_class_for_a_policy_are_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(tiny_model(), arguments, train_dataset=[{"input_ids": row} for row in tiny_batch(0, 0, 0)])
    with pytest.raises(ValueError, match="--deepspeed"):
        add_selection(trainer, agsel.FullFineTuning())
    with pytest.raises(ValueError, match="policy must be a policy"):
        add_selection(trainer, agsel.FullFineTuning)  # type: ignore[arg-type]
