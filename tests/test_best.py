"""The best checkpoint: its metric is one that the evaluations find, and it is found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState, TrainingArguments

from agsel.errors import UserError
from agsel.runs.trainer import find_best, owes_evaluation
from agsel.training.best import require_metric

GIVEN: dict[str, Any] = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_tasks": "gsm8k=test.jsonl",
    "metric_for_best_model": None,
    "greater_is_better": None,
}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"metric_for_best_model": "loss"},
        {"metric_for_best_model": "eval_mean_token_accuracy", "eval_tasks": None},
        {"metric_for_best_model": "aux_loss"},
        {"metric_for_best_model": "gsm8k_accuracy", "save_strategy": "best"},
        {"metric_for_best_model": "eval_gsm8k_nll", "greater_is_better": False},
        {"metric_for_best_model": "anything", "eval_strategy": "no"},
    ],
)
def test_a_number_of_the_evaluations_is_accepted(changed: dict[str, Any]) -> None:
    require_metric(GIVEN | changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"metric_for_best_model": "bleu"},
            "finds loss, mean_token_accuracy, entropy, gsm8k_accuracy, gsm8k_nll",
        ),
        ({"metric_for_best_model": "eval_accuracy"}, "no number of an evaluation .*did you mean 'gsm8k_accuracy'"),
        (
            {"metric_for_best_model": "gsm8k_accuracy", "eval_tasks": None},
            "finds loss, mean_token_accuracy, entropy[;:]",
        ),
        ({"metric_for_best_model": "eval_gsm8k_nll"}, "lower is better: set --greater_is_better false"),
        ({"save_strategy": "best"}, "--save_strategy best needs --metric_for_best_model"),
    ],
)
def test_a_metric_that_would_fail_or_mislead_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        require_metric(GIVEN | changed)
    assert "\n" not in str(refusal.value)


def state(best: str | None, step: int | None) -> TrainerState:
    return TrainerState(best_model_checkpoint=best, best_global_step=step)


def test_the_best_checkpoint_is_found_where_the_run_folder_is_now(tmp_path: Path) -> None:
    """The Trainer knows it by the path that it had, and forgets what is not there."""
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    moved, kept, lost, none = state(None, 2), state("elsewhere/checkpoint-2", 2), state(None, 3), state(None, None)
    for known in (moved, kept, lost, none):
        find_best(known, tmp_path / "checkpoint-4")
    assert moved.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert kept.best_model_checkpoint == "elsewhere/checkpoint-2"
    assert lost.best_model_checkpoint is None
    assert none.best_model_checkpoint is None
    new = state(None, 2)
    find_best(new, None)
    assert new.best_model_checkpoint is None


@pytest.mark.parametrize(
    ("settings", "step", "epoch", "expected"),
    [
        ({"eval_strategy": "steps", "eval_steps": 4}, 8, 0.8, True),
        ({"eval_strategy": "steps", "eval_steps": 4}, 7, 0.7, False),
        ({"eval_strategy": "steps", "eval_steps": 4}, 10, 1.0, True),  # the last one
        ({"eval_strategy": "steps", "eval_steps": 4, "eval_delay": 9}, 8, 0.8, False),
        ({"eval_strategy": "epoch"}, 10, 1.0, True),
        ({"eval_strategy": "epoch"}, 8, 0.8, False),
        ({"eval_strategy": "epoch", "eval_delay": 2}, 10, 1.0, False),
        ({"eval_strategy": "no"}, 10, 1.0, False),
    ],
)
def test_an_evaluation_that_was_due_when_the_run_was_stopped_is_owed(
    settings: dict[str, Any], step: int, epoch: float, expected: bool, tmp_path: Path
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    state = TrainerState(global_step=step, epoch=epoch, max_steps=10, eval_steps=4)
    state.log_history = [{"step": step - 1, "eval_loss": 1.0}, {"step": step, "loss": 1.0}]
    assert owes_evaluation(arguments, state) == expected
    state.log_history.append({"step": step, "eval_other_loss": 1.0})
    assert not owes_evaluation(arguments, state)
