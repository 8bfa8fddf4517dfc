"""agsel in a plain `transformers.Trainer`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import agsel
from agsel.training import add_selection, attachment
from tests.distributed import REPOSITORY, run_ranks
from tests.tiny import tiny_batch, tiny_model
from tests.tiny_run import save_model


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the worker, and what it printed."""
    folder = tmp_path_factory.mktemp("trainers")
    save_model(folder / "model")
    return folder, run_ranks(REPOSITORY / "tests" / "trainer_worker.py", folder)


def test_a_plain_trainer_trains_the_selected_blocks_with_its_own_settings(worker: tuple[Path, str]) -> None:
    folder, output = worker
    result = json.loads((folder / "result.json").read_text())
    steps = result["steps"]
    assert len(steps) == 6
    for number, step in enumerate(steps):
        assert step["changed"] == sorted(step["selected"])
        assert len(step["selected"]) == 2
        assert step["rates"] == pytest.approx([1e-2 * (6 - number) / 6] * 4), "the schedule acts on every group"
    assert result["adam"] == {"betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1, "fused": True}
    assert result["hooks"] == 0, "nothing drags the backward below the lowest selected block"
    assert len(result["logged"]) == 5, "steps 1, 2, 4 and 6, and the summary"
    for names in result["logged"][:4]:
        assert {"speed/ms_per_step", "memory/host_gb", "selection/entropy", "block_norm/layers.0"} <= {*names}
    assert "selection/entropy" in result["kept"]
    assert "block_norm/layers.0" not in result["kept"], "the state of the Trainer stays small"
    assert json.loads((folder / "selection.json").read_text())["steps"] == 6
    assert len(re.findall(r"^step 6/6  epoch \S+  loss ", output, re.M)) == 1
    assert "'loss'" not in output, "the Trainer's own line is not printed beside it"


def test_checkpointing_changes_nothing_in_trl_trainer_with_adapters_at_zero_3(worker: tuple[Path, str]) -> None:
    """TRL wants the reentrant kind there, and twice has the embedding's output require a gradient."""
    folder, _ = worker
    plain, checkpointed = (json.loads((folder / f"adapters-{done}.json").read_text()) for done in (False, True))
    assert len(plain["losses"]) == 4
    assert checkpointed == plain


def test_a_trainer_without_deepspeed_and_a_class_for_a_policy_are_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(tiny_model(), arguments, train_dataset=[{"input_ids": row} for row in tiny_batch(0, 0, 0)])
    with pytest.raises(ValueError, match="--deepspeed"):
        add_selection(trainer, agsel.FullFineTuning())
    with pytest.raises(ValueError, match="policy must be a policy"):
        add_selection(trainer, agsel.FullFineTuning)  # type: ignore[arg-type]


def test_a_trainer_that_makes_no_second_engine_is_refused() -> None:
    """As transformers behaves: of a second `train()` it prepares the optimizer alone."""
    accelerator: Any = SimpleNamespace(prepare=lambda *objects: objects, deepspeed_engine_wrapped=None)
    trainer: Any = SimpleNamespace(accelerator=accelerator, is_in_train=True)
    attachment._when_engine_is_made(trainer, lambda _: pytest.fail("there is no engine"))
    with pytest.raises(ValueError, match="make a new Trainer"):
        accelerator.prepare(torch.optim.AdamW(nn.Linear(2, 2).parameters()))
