"""The command line of agsel: its flags are frozen here, and bad values are refused by name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from agsel.data.fields import Fields
from agsel.errors import UserError
from agsel.policies import METHODS, AdaGradSelect, FullFineTuning, Plan, Policy, RandomBlocks, TopK
from agsel.training.arguments import DataArguments, OutputArguments, SafetyArguments, SelectionArguments, TaskArguments
from agsel.training.methods import build_policy, method_arguments, policy_class, unread
from agsel.training.usage import OWN


def defaults(arguments: type) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(arguments)}


def test_the_command_line_is_frozen() -> None:
    """A new, renamed or changed flag fails here, so that it is changed on purpose, with README and CHANGELOG."""
    assert defaults(SelectionArguments) == {
        "method": "adagradselect",
        "select_blocks": None,
        "select_from": 0,
        "offload_states": True,
        "pin_memory": True,
        "compile_layers": False,
        "fold_adapters": False,
        "choose_early": False,
        "force": False,
    }
    assert defaults(method_arguments(AdaGradSelect, ())) == {
        "select_fraction": 0.3,
        "selection_seed": None,
        "explore_steps": None,
        "epsilon_start": 1.0,
        "epsilon_end": 0.05,
        "dirichlet_delta": 1.0,
        "dirichlet_draw": "topk",
        "select_every": 1,
        "block_order": "random",
        "probe_steps": 5,
        "refresh_every": 500,
        "temperature": None,
        "freeze_power": 1.5,
        "freeze_most": 0.6,
        "freeze_steps": None,
    }
    own = {"lisa": ("select_every", 20), "badam": ("select_every", None), "grass": ("select_every", 25)}
    for method, (name, value) in (own | {"ist": ("select_fraction", 0.25)}).items():
        assert defaults(method_arguments(METHODS[method], ()))[name] == value
    assert defaults(DataArguments) == {"datasets": None, "eval_dataset": None, "eval_split_fraction": None}
    assert defaults(Fields) == {
        "prompt_field": None,
        "completion_field": None,
        "prompt_template": None,
        "completion_template": None,
    }
    assert defaults(TaskArguments) == {"eval_tasks": None, "eval_task_rows": 200, "eval_max_new_tokens": 256}
    assert defaults(OutputArguments) == {"merge_adapter": False, "report": True}
    assert defaults(SafetyArguments) == {"rank_timeout": 600, "max_skipped_steps": 50, "sanity_checks": 0}


def test_every_flag_explains_itself() -> None:
    for arguments in (*OWN, method_arguments(AdaGradSelect, ())):
        for field in dataclasses.fields(arguments):
            assert len(field.metadata["help"]) > 40, field.name
            assert "%" not in field.metadata["help"], "argparse expands % signs"


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


def described(method: str = "adagradselect", **changed: object) -> Policy:
    settings = defaults(method_arguments(policy_class(method), ())) | {"seed": 7} | changed
    return build_policy(method, settings)


def test_the_policy_is_the_one_described() -> None:
    assert described("full") == FullFineTuning()
    assert described("topk", select_fraction=0.1) == TopK(fraction=0.1, seed=7)
    assert described("random", select_every=5) == RandomBlocks(fraction=0.3, every=5, seed=7)
    assert described() == AdaGradSelect(fraction=0.3, explore_steps=None, seed=7)
    assert described(explore_steps=0, selection_seed=0, dirichlet_draw="sample") == AdaGradSelect(
        fraction=0.3, explore_steps=0, seed=0, draw="sample"
    )


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("--select_fraction", {"select_fraction": 0.0}),
        ("--select_fraction", {"select_fraction": 1.01, "method": "topk"}),
        ("--select_every", {"select_every": 0, "method": "random"}),
        ("--epsilon_end", {"epsilon_end": 0.0}),
        ("--epsilon_start", {"epsilon_start": 1.5}),
        ("--explore_steps", {"explore_steps": -1}),
        ("--dirichlet_delta", {"dirichlet_delta": 0.0}),
        ("--dirichlet_draw", {"dirichlet_draw": "best"}),
        ("--selection_seed", {"selection_seed": -1}),
        ("--freeze_power", {"freeze_power": 0.0, "method": "freezeout"}),
        ("--freeze_most", {"freeze_most": 1.1, "method": "freezeout"}),
        ("--freeze_steps", {"freeze_steps": 0, "method": "freezeout"}),
        ("--method", {"method": "adagrad"}),
    ],
)
def test_bad_values_are_refused_by_name(flag: str, changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=flag) as refusal:
        described(**changed)
    assert "\n" not in str(refusal.value)


def test_only_layers_or_all_blocks_can_take_part() -> None:
    with pytest.raises(UserError, match="--select_blocks"):
        SelectionArguments(select_blocks="layer")


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("full", ["select_fraction", "selection_seed", "epsilon_start", "select_every"]),
        ("topk", ["epsilon_start", "select_every"]),
        ("random", ["epsilon_start"]),
        ("adagradselect", ["select_every"]),
        ("freezeout", ["select_fraction", "selection_seed", "epsilon_start", "select_every"]),
    ],
)
def test_a_method_knows_what_it_does_not_read(method: str, names: list[str]) -> None:
    given = ["learning_rate", "select_fraction", "selection_seed", "epsilon_start", "select_every", "method"]
    assert unread(policy_class(method), given) == names


class Lazy(TopK):
    """Without a line of its own."""


@dataclass(kw_only=True)
class Strided(Policy):
    """Fields without a word on the command line, one of them the name of a setting of the run."""

    stride: int = 2
    seed: int = 0

    def make_plan(self) -> Plan:
        return Plan.of([0])


class Unfinished(Policy):
    pass


HERE = "tests.test_training_arguments"


def test_a_policy_from_elsewhere_reads_the_flags_of_its_fields() -> None:
    assert policy_class(f"{HERE}:Lazy") is Lazy
    assert described(f"{HERE}:Lazy", select_fraction=0.5) == Lazy(fraction=0.5, seed=7)
    arguments = method_arguments(Strided, ["seed"])
    assert defaults(arguments)["stride"] == 2
    assert "seed" not in defaults(arguments), "that of the run"
    assert build_policy(f"{HERE}:Strided", {"stride": 5, "seed": 9}) == Strided(stride=5, seed=9)
    assert unread(Strided, ["stride", "select_fraction"]) == ["select_fraction"]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("nowhere_at_all:Rule", "no module 'nowhere_at_all' .*PYTHONPATH"),
        (f"{HERE}:Nothing", "no subclass of agsel.Policy"),
        (f"{HERE}:HERE", "no subclass of agsel.Policy"),
        (f"{HERE}:Unfinished", "does not define make_plan"),
        ("adagradselct", "did you mean 'adagradselect'"),
    ],
)
def test_what_is_no_policy_is_refused(method: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        policy_class(method)
