"""The command line of agsel: its flags are frozen here, and bad values are refused by name."""

from __future__ import annotations

import dataclasses
import math

import pytest

from agsel.policies import AdaGradSelect, FullFineTuning, RandomBlocks, TopK
from agsel.training.arguments import DataArguments, SafetyArguments, SelectionArguments, build_policy


def defaults(arguments: type) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(arguments)}


def test_the_command_line_is_frozen() -> None:
    """A new, renamed or changed flag fails here, so that it is changed on purpose, with README and CHANGELOG."""
    assert defaults(SelectionArguments) == {
        "method": "adagradselect",
        "select_fraction": 0.3,
        "select_every": 1,
        "epsilon_start": 1.0,
        "epsilon_end": 0.05,
        "explore_steps": None,
        "dirichlet_delta": 1.0,
        "dirichlet_draw": "topk",
        "select_blocks": None,
        "offload_states": True,
        "pin_memory": True,
        "compile_layers": False,
        "force": False,
        "selection_seed": None,
    }
    assert defaults(DataArguments) == {
        "prompt_field": None,
        "completion_field": None,
        "prompt_template": None,
        "completion_template": None,
    }
    assert defaults(SafetyArguments) == {"rank_timeout": 600, "max_skipped_steps": 50, "sanity_checks": 0}


def test_every_flag_explains_itself() -> None:
    for arguments in (SelectionArguments, DataArguments, SafetyArguments):
        for field in dataclasses.fields(arguments):
            assert len(field.metadata["help"]) > 40, field.name
            assert "%" not in field.metadata["help"], "argparse expands % signs"


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("--method", {"method": "adagrad"}),
        ("--select_fraction", {"select_fraction": 0.0}),
        ("--select_fraction", {"select_fraction": 1.01, "method": "topk"}),
        ("--select_every", {"select_every": 0, "method": "random"}),
        ("--epsilon_end", {"epsilon_end": 0.0}),
        ("--epsilon_start", {"epsilon_start": 1.5}),
        ("--explore_steps", {"explore_steps": -1}),
        ("--dirichlet_delta", {"dirichlet_delta": 0.0}),
        ("--dirichlet_draw", {"dirichlet_draw": "best"}),
        ("--select_blocks", {"select_blocks": "layer"}),
    ],
)
def test_bad_values_are_refused_by_name(flag: str, changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=flag) as refusal:
        SelectionArguments(**changed)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rank_timeout", 0.0),
        ("rank_timeout", 4.9),
        ("rank_timeout", math.inf),
        ("rank_timeout", math.nan),
        ("max_skipped_steps", 0),
        ("sanity_checks", -1),
    ],
)
def test_bad_limits_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{setting}") as refusal:
        SafetyArguments(**{setting: value})  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_the_policy_is_the_one_described() -> None:
    def policy(**changed: object) -> object:
        return build_policy(SelectionArguments(**changed), explore_steps=40, seed=7)  # type: ignore[arg-type]

    assert policy(method="full") == FullFineTuning()
    assert policy(method="topk", select_fraction=0.1) == TopK(fraction=0.1, seed=7)
    assert policy(method="random", select_every=5) == RandomBlocks(fraction=0.3, every=5, seed=7)
    assert policy() == AdaGradSelect(fraction=0.3, explore_steps=40, seed=7)
    assert policy(explore_steps=0, selection_seed=0, dirichlet_draw="sample") == AdaGradSelect(
        fraction=0.3, explore_steps=0, seed=0, draw="sample"
    )


def test_all_blocks_take_part_in_full_fine_tuning_only() -> None:
    assert SelectionArguments().taking_part == "layers"
    assert SelectionArguments(method="full").taking_part == "all"
    assert SelectionArguments(method="full", select_blocks="layers").taking_part == "layers"
