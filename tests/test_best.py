"""The metric of the best checkpoint: one that the evaluations find, and whose best value is meant."""

from __future__ import annotations

from typing import Any

import pytest

from agsel.errors import UserError
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
