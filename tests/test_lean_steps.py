"""A trainer whose steps wait less, against TRL and the Trainer: the same losses, gradients and logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from agsel.training import lean_steps
from agsel.training.lean_steps import LeanSteps
from tests.elements.test_summed_loss import mixture, trainer_of
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_rank")


def batches_of(trainer: LeanSteps) -> list[dict[str, Tensor]]:
    rows = [*trainer.train_dataset]
    return [trainer.data_collator(rows[start : start + 2]) for start in range(0, len(rows) - 1, 2)]


def steps(trainer: LeanSteps, loss_of: Any, items: int | None) -> list[float]:
    """The losses of all batches; what is learnt of the last is nothing."""
    trainer.model.train()
    batches = batches_of(trainer)
    batches[-1]["labels"] = torch.full_like(batches[-1]["labels"], -100)
    options = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    return [loss_of(trainer.model, batch, **options).item() for batch in batches]


def logged(trainer: LeanSteps) -> dict[str, float]:
    if isinstance(trainer, LeanSteps):
        trainer.read_measures()
    trainer.log({"loss": 1.0})
    return {name: value for name, value in trainer.state.log_history[-1].items() if name not in ("step", "epoch")}


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize(
    "settings", [{}, {"packing": True, "max_length": 24}, {"padding_free": True, "max_length": None}], ids=str
)
def test_losses_and_logs_are_those_of_trl(tmp_path: Path, settings: dict[str, Any], items: int | None) -> None:
    trainer = trainer_of(tmp_path, tiny_model(), **settings)
    expected = steps(trainer, super(LeanSteps, trainer).compute_loss, items), logged(trainer)
    trainer._total_train_tokens = 0
    found = steps(trainer, trainer.compute_loss, items)
    assert len(found) > 1
    assert trainer._unread
    assert not trainer._metrics["train"]
    assert (found, logged(trainer)) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert {"entropy", "mean_token_accuracy", "num_tokens"} < expected[1].keys()
    assert not trainer._unread


def test_gradients_are_those_of_trl(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_model())
    trainer.model.train()
    batch = batches_of(trainer)[0]
    gradients = []
    for loss_of in (trainer.compute_loss, super(LeanSteps, trainer).compute_loss):
        trainer.model.zero_grad()
        loss_of(trainer.model, dict(batch), num_items_in_batch=torch.tensor(9)).backward()
        gradients.append([parameter.grad.clone() for parameter in trainer.model.parameters()])
    torch.testing.assert_close(*gradients)


def test_sums_of_losses_leave_no_trace(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_model())
    first = steps(trainer, trainer.compute_loss, None)
    unread = len(trainer._unread)
    trainer.summed_loss([*trainer.train_dataset])
    assert len(trainer._unread) == unread == len(first)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (tiny_model, {"label_smoothing_factor": 0.1}),
        (tiny_model, {"loss_type": "dft"}),
        (mixture, {}),
    ],
    ids=["smoothed", "dft", "experts"],
)
def test_every_other_loss_is_left_to_trl(tmp_path: Path, model: Any, settings: dict[str, Any]) -> None:
    trainer = trainer_of(tmp_path, model(), **settings)
    expected = steps(trainer, super(LeanSteps, trainer).compute_loss, None)
    trainer._metrics["train"].clear()
    assert steps(trainer, trainer.compute_loss, None) == pytest.approx(expected, nan_ok=True)
    assert not trainer._unread
    assert trainer._metrics["train"]


def test_measures_that_nobody_reads_for_long_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, tiny_model(), logging_nan_inf_filter=False)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    found = []
    for separate in (lean_steps.SEPARATE, 2):
        monkeypatch.setattr(lean_steps, "SEPARATE", separate)
        trainer._total_train_tokens, trainer._unread = 0, []
        for batch in 3 * batches_of(trainer):
            trainer.training_step(trainer.model, batch)
        found.append((len(trainer._unread), logged(trainer)))
    assert found[0][0] > 3 > found[1][0]
    assert found[0][1] == found[1][1]


def test_evaluation_is_left_to_trl(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_model())
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batches_of(trainer)[0])
    assert not trainer._unread
    assert trainer._metrics["eval"]


@pytest.mark.parametrize("filters", [True, False])
def test_a_loss_that_is_no_number_counts_as_the_mean_of_those_before(tmp_path: Path, filters: bool) -> None:
    trainer = trainer_of(tmp_path, tiny_model(), logging_nan_inf_filter=filters)
    trainer._tr_loss, trainer.state.global_step, trainer._globalstep_last_logged = torch.tensor(6.0), 7, 5
    trainer.current_gradient_accumulation_steps = 1
    batch, broken = batches_of(trainer)[:2]
    assert trainer.training_step(trainer.model, batch).item() == pytest.approx(4.1, abs=0.2)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(math.nan)
    found = trainer.training_step(trainer.model, broken).item()
    assert found == 2 if filters else math.isnan(found)


def test_operations_are_counted_as_by_the_trainer(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_model())
    batches = batches_of(trainer)
    assert len({batch["input_ids"].numel() for batch in batches}) > 1
    for batch in batches:
        assert trainer.floating_point_ops(batch) == Trainer.floating_point_ops(trainer, batch) > 0


def test_a_log_of_one_rank_alone_waits_for_no_other(tmp_path: Path) -> None:
    """What all ranks have measured is read where all of them log, and at the end of an epoch."""
    settings = {"max_steps": 5, "logging_steps": 2, "per_device_train_batch_size": 1, "save_strategy": "no"}
    trainer = trainer_of(tmp_path, tiny_model(), **settings)

    class OwnLog(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step % 2:
                assert trainer._unread
                trainer.log({"own": 1.0})

    trainer.add_callback(OwnLog())
    trainer.train()
    measured = [("own" in entry, "entropy" in entry) for entry in trainer.state.log_history]
    own, of_all, end = (True, False), (False, True), (False, True)
    assert measured == [own, of_all, own, of_all, own, end]
    assert trainer.args.logging_nan_inf_filter
