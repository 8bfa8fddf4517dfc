"""What holds for every policy: plan and resolve, counts, saved state, seeds, the number of blocks, settings."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import agsel.policies
from agsel.errors import UserError
from agsel.policies import (
    METHODS,
    AdaGradSelect,
    FreezeOut,
    FullFineTuning,
    Plan,
    Policy,
    RandomBlocks,
    TopK,
    Update,
    flags_of,
)
from tests.policies.running import BLOCKS, commit, layers, norms_of, run, started

STEPS = 200
SAVES = 40

POLICIES: dict[str, Callable[[int], Policy]] = {
    "adagradselect": lambda seed: AdaGradSelect(fraction=0.3, explore_steps=100, epsilon_end=0.2, seed=seed),
    "adagradselect, sample": lambda seed: AdaGradSelect(fraction=0.3, explore_steps=30, draw="sample", seed=seed),
    "random": lambda seed: RandomBlocks(fraction=0.3, seed=seed),
    "random, every 7": lambda seed: RandomBlocks(fraction=0.3, every=7, seed=seed),
    "topk": lambda seed: TopK(fraction=0.3, seed=seed),
    "freezeout": lambda seed: FreezeOut(freeze_steps=150),
    "full": lambda seed: FullFineTuning(),
}
DRAWING = [name for name in POLICIES if name not in ("topk", "freezeout", "full")]
every_policy = pytest.mark.parametrize("name", POLICIES)


@every_policy
def test_counts_are_how_often_each_block_was_selected(name: str) -> None:
    policy = started(POLICIES[name](0))
    selected = [selection for _, selection in run(policy, STEPS)]
    occurrences = Counter(block for selection in selected for block in selection)
    assert policy.counts == [occurrences[block] for block in range(BLOCKS)]
    assert policy.step == STEPS


def test_counts_move_on_both_kinds_of_step() -> None:
    policy = started(POLICIES["adagradselect"](0))
    kinds = set()
    for step in range(STEPS):
        before = list(policy.counts)
        kinds.add(policy.plan().kind)
        selected = commit(policy, norms_of(step))
        assert [after - count for after, count in zip(policy.counts, before, strict=True)] == [
            int(block in selected) for block in range(BLOCKS)
        ]
    assert kinds == {"explore", "exploit"}


@every_policy
def test_selections_are_ascending_and_planned(name: str) -> None:
    policy = started(POLICIES[name](0))
    for plan, selected in run(policy, STEPS):
        assert list(selected) == sorted(set(selected))
        assert set(selected) <= plan.trainable
        assert plan.kind == "explore" or set(selected) == plan.trainable
        assert plan.kind == "exploit" or plan.trainable == set(range(BLOCKS))
        if name != "freezeout":
            assert len(selected) == (BLOCKS if name == "full" else 3)


@every_policy
def test_planning_again_changes_nothing(name: str) -> None:
    once, often = (started(POLICIES[name](0)) for _ in range(2))
    for step in range(STEPS):
        plans = [often.plan() for _ in range(3)]
        assert plans == [once.plan()] * 3
        assert often.state_dict() == once.state_dict()
        assert commit(often, norms_of(step)) == commit(once, norms_of(step))


@every_policy
def test_commit_alone_is_a_whole_step(name: str) -> None:
    planned, unplanned = (started(POLICIES[name](0)) for _ in range(2))
    assert [commit(unplanned, norms_of(step)) for step in range(50)] == [chosen for _, chosen in run(planned, 50)]


@every_policy
@pytest.mark.parametrize("planned", [False, True], ids=["between steps", "after plan"])
def test_saved_anywhere_it_continues_alike(name: str, planned: bool) -> None:
    """Each of the first SAVES steps is a cut; the state goes through JSON into a policy that has made steps already."""
    policy = started(POLICIES[name](0))
    expected = run(started(POLICIES[name](0)), SAVES + STEPS)
    for step in range(SAVES):
        if planned:
            policy.plan()
        saved = json.dumps(policy.state_dict())
        resumed = started(POLICIES[name](0))
        run(resumed, 3)
        resumed.load_state_dict(json.loads(saved))
        assert resumed.state_dict() == policy.state_dict()
        assert run(resumed, STEPS) == expected[step : step + STEPS]
        assert json.dumps(policy.state_dict()) == saved, "resuming moved the policy that was saved"
        run(policy, 1)


@every_policy
def test_starting_again_forgets(name: str) -> None:
    policy = started(POLICIES[name](0))
    first = run(policy, 50)
    policy.plan()
    policy.start(layers(BLOCKS))
    assert run(policy, 50) == first


@every_policy
def test_the_same_seed_chooses_the_same(name: str) -> None:
    assert run(started(POLICIES[name](5)), STEPS) == run(started(POLICIES[name](5)), STEPS)


@pytest.mark.parametrize("name", DRAWING)
def test_another_seed_chooses_otherwise(name: str) -> None:
    """From the first steps on, and not only later."""
    assert run(started(POLICIES[name](5)), 10) != run(started(POLICIES[name](6)), 10)


@pytest.mark.parametrize(
    ("fraction", "blocks", "expected"),
    [
        (0.1, 16, 1),
        (0.1, 18, 1),
        (0.1, 9, 1),
        (0.1, 20, 2),
        (0.3, 10, 3),
        (0.3, 24, 7),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.7, 10, 7),
        (1 / 3, 3, 1),
        (2 / 3, 3, 2),
        (0.999, 4, 3),
        (1.0, 7, 7),
        (1, 7, 7),
        (1e-6, 7, 1),
        (0.5, 1, 1),
    ],
)
def test_the_number_of_blocks_is_truncated_but_not_by_floating_point(
    fraction: float, blocks: int, expected: int
) -> None:
    policy = started(TopK(fraction=fraction), blocks)
    assert policy.blocks_per_step == expected
    assert len(commit(policy, dict.fromkeys(range(blocks), 1.0))) == expected


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([1, 5, 3, 4, 2, 0], (1, 2, 3)),
        ([0, 1, 2, 3, 4, 5], (3, 4, 5)),
        ([2, 2, 2, 2, 2, 2], (0, 1, 2)),
        ([1, 2, 3, 3, 2, 2], (1, 2, 3)),
        ([0, 0, 0, 0, 0, 7], (0, 1, 5)),
        ([1e-300, 0, 1e300, 1e-299, 0, 1e-301], (0, 2, 3)),
    ],
)
@pytest.mark.parametrize(
    "policy",
    [TopK(fraction=0.5), AdaGradSelect(fraction=0.5, explore_steps=1)],
    ids=["topk", "adagradselect"],
)
def test_exploring_picks_the_largest_norms_and_of_equal_ones_the_earlier(
    policy: Policy, norms: list[float], expected: tuple[int, ...]
) -> None:
    policy.start(layers(6))
    assert policy.plan().kind == "explore"
    assert commit(policy, dict(enumerate(norms))) == expected


def test_full_fine_tuning_updates_everything_without_exploring() -> None:
    policy = started(FullFineTuning(), 3)
    assert run(policy, 5) == [(policy.plan(), (0, 1, 2))] * 5
    assert policy.plan().kind == "exploit"


NAN, INFINITY = float("nan"), float("inf")
OUT_OF_RANGE: list[tuple[Callable[..., Policy], dict[str, Any], str]] = [
    *((TopK, {"fraction": value}, "fraction --select_fraction") for value in (0, -0.1, 1.01, NAN)),
    (RandomBlocks, {"fraction": 0.0}, "fraction --select_fraction"),
    (RandomBlocks, {"every": 0}, "every --select_every"),
    (RandomBlocks, {"seed": -1}, "seed --selection_seed"),
    (AdaGradSelect, {"fraction": 2}, "fraction --select_fraction"),
    (AdaGradSelect, {"explore_steps": -1}, "explore_steps --explore_steps"),
    (AdaGradSelect, {"epsilon_start": 1.1}, "epsilon_start --epsilon_start"),
    (AdaGradSelect, {"epsilon_start": NAN}, "epsilon_start --epsilon_start"),
    *((AdaGradSelect, {"epsilon_end": value}, "epsilon_end --epsilon_end") for value in (0.0, 1.1, NAN)),
    (AdaGradSelect, {"epsilon_start": 0.1, "epsilon_end": 0.2}, "epsilon_end epsilon_start --epsilon_end"),
    *(
        (AdaGradSelect, {"dirichlet_delta": v}, "dirichlet_delta --dirichlet_delta")
        for v in (0.0, -1.0, 1e-310, NAN, INFINITY)
    ),
    (AdaGradSelect, {"draw": "best"}, "draw --dirichlet_draw"),
]


@pytest.mark.parametrize(("method", "settings", "named"), OUT_OF_RANGE)
def test_a_setting_out_of_range_is_refused_by_name(
    method: Callable[..., Policy], settings: dict[str, Any], named: str
) -> None:
    needed: dict[str, Any] = {"fraction": 0.3} | ({"explore_steps": 1} if method is AdaGradSelect else {})
    method(**needed)
    with pytest.raises(ValueError, match="--") as error:
        method(**needed | settings)
    message = str(error.value)
    assert all(re.search(rf"(?<![\w-]){name}\b", message) for name in named.split()), message
    assert "\n" not in message


def state_of(policy: Policy, blocks: int = BLOCKS) -> dict[str, Any]:
    started(policy, blocks)
    run(policy, 5)
    return json.loads(json.dumps(policy.state_dict()))


def test_a_state_over_other_blocks_is_refused() -> None:
    state = state_of(TopK(fraction=0.3), 14)
    with pytest.raises(ValueError, match=r"^the saved selection is over 14 blocks, this run has 12: .*--select_blocks"):
        started(TopK(fraction=0.3)).load_state_dict(state)


@every_policy
def test_a_state_of_another_method_is_refused(name: str) -> None:
    policy = started(POLICIES[name](0))
    other = FullFineTuning() if name != "full" else TopK(fraction=0.3)
    state = state_of(other)
    message = rf"^the saved selection is of {type(other).__name__}, this run's of {type(policy).__name__}: .*--method"
    with pytest.raises(ValueError, match=message):
        policy.load_state_dict(state)
    assert policy.state_dict() == started(POLICIES[name](0)).state_dict(), "a refused state has changed the policy"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_setting_has_the_name_of_what_selection_json_adds(method: type[Policy]) -> None:
    names = {field.name for field in flags_of(method).values()}
    assert not names & {"method", "steps", "blocks", "counts"}


def test_changed_settings_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    state = state_of(RandomBlocks(fraction=0.3, every=2))
    with caplog.at_level(logging.WARNING, logger="agsel"):
        started(RandomBlocks(fraction=0.3, every=2)).load_state_dict(state)
        assert caplog.messages == []
        started(RandomBlocks(fraction=0.5, every=3)).load_state_dict(state)
    assert caplog.messages == ["the selection continues with changed settings: fraction 0.3 -> 0.5, every 2 -> 3"]


def test_settings_name_the_method_and_every_setting() -> None:
    assert RandomBlocks(fraction=0.3, every=2, seed=4).settings() == {
        "method": "RandomBlocks",
        "fraction": 0.3,
        "every": 2,
        "seed": 4,
    }


def test_policies_are_plain_python_and_numpy() -> None:
    imported = set()
    for path in Path(agsel.policies.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported.add(str(node.module))
    assert "numpy" in imported
    others = {name for name in imported if name.split(".")[0] in ("torch", "deepspeed", "transformers", "trl")}
    own = {
        name
        for name in imported
        if name.split(".")[0] == "agsel" and not name.startswith(("agsel.policies.", "agsel.errors"))
    }
    assert not others | own


@dataclass(kw_only=True)
class Scripted(Policy):
    """Does what it is given: a plan by step, and what it makes of the norms."""

    plans: tuple[Plan, ...]
    update: Update | None = None

    def make_plan(self) -> Plan:
        return self.plans[self.step]

    def settings(self) -> dict[str, Any]:
        return {"method": "Scripted"}

    def choose(self, norms: Mapping[int, float]) -> Update:
        return self.update or super().choose(norms)


ALL = frozenset(range(BLOCKS))


def test_a_step_may_update_nothing_and_counts_as_a_step() -> None:
    policy = started(Scripted(plans=(Plan(ALL, Update(frozenset())), Plan.of([2, 4], fresh=[4]))))
    assert policy.plan().kind == "probe"
    assert policy.commit(norms_of(0)).blocks == frozenset()
    assert (policy.step, sum(policy.counts)) == (1, 0)
    assert policy.commit(norms_of(1)) == Update(frozenset({2, 4}), fresh=frozenset({4}))
    assert policy.counts == [int(block in (2, 4)) for block in range(BLOCKS)]


def test_a_choice_after_the_backward_sees_the_norms_of_all_trainable_blocks() -> None:
    seen: list[Mapping[int, float]] = []

    class Watching(Scripted):
        def choose(self, norms: Mapping[int, float]) -> Update:
            seen.append(norms)
            return Update(frozenset({3}))

    policy = started(Watching(plans=(Plan(frozenset({3, 5}), None), Plan.of([3]))))
    assert policy.commit({3: 1.0, 5: 2.0}) == Update(frozenset({3}))
    policy.commit({3: 4.0})
    assert seen == [{3: 1.0, 5: 2.0}, {3: 4.0}]


@pytest.mark.parametrize(
    ("plan", "update", "words"),
    [
        (Plan.of([BLOCKS]), None, f"Scripted planned block {BLOCKS} at step 1"),
        (Plan.of([]), None, "Scripted planned no block at step 1"),
        (Plan(ALL - {2}, Update(frozenset({2}))), None, "Scripted updates block 2 at step 1"),
        (Plan.of([1], fresh=[2]), None, "Scripted starts anew block 2 at step 1"),
        (Plan(ALL - {2}, None), Update(frozenset({2})), "Scripted updates block 2 at step 1"),
        (Plan(ALL, None), Update(frozenset({1}), fresh=frozenset({2})), "Scripted starts anew block 2 at step 1"),
    ],
)
def test_a_rule_that_names_blocks_it_may_not_is_refused(plan: Plan, update: Update | None, words: str) -> None:
    policy = started(Scripted(plans=(plan,), update=update))
    with pytest.raises(UserError, match=words):
        policy.commit(norms_of(0))


def test_what_a_part_of_the_rows_has_chosen_holds_for_the_step() -> None:
    policy, resumed = started(TopK(fraction=0.3)), started(TopK(fraction=0.3))
    rising = {block: float(block) for block in range(BLOCKS)}
    plan = policy.choose_early(rising)
    assert (plan.kind, plan.trainable) == ("explore", frozenset(range(BLOCKS - 3, BLOCKS)))
    resumed.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    for each in (policy, resumed):
        assert each.plan() == plan
        assert each.commit({block: -norm for block, norm in rising.items()}).blocks == plan.trainable
        assert each.plan() == Plan(ALL, None)


def test_a_rule_that_chooses_is_asked_once() -> None:
    update = Update(frozenset({1}))
    policy = started(Scripted(plans=(Plan(ALL - {2}, None),) * 2, update=update))
    policy.choose_early(norms_of(0))
    policy.update = Update(frozenset({3}))
    assert policy.commit(norms_of(1)) == update
    policy.update = Update(frozenset({2}))
    with pytest.raises(UserError, match="Scripted updates block 2 at step 2"):
        policy.choose_early(norms_of(2))


def test_every_kind_of_plan_is_saved_and_restored() -> None:
    plans = (Plan(ALL, None), Plan(ALL, Update(frozenset())), Plan.of([1, 2]), Plan.of([1, 2], fresh=[2]))
    for number, plan in enumerate(plans):
        policy, resumed = (started(Scripted(plans=plans)) for _ in range(2))
        for step in range(number):
            policy.update = Update(frozenset({1}))
            policy.commit(norms_of(step))
        policy.plan()
        resumed.load_state_dict(json.loads(json.dumps(policy.state_dict())))
        assert resumed.plan() == plan
        assert resumed.state_dict()["plan"] == policy.state_dict()["plan"]


def test_plans_keep_the_form_that_earlier_checkpoints_have() -> None:
    """Written by agsel before its plans had updates."""
    policy = started(RandomBlocks(fraction=0.3, seed=1))
    assert policy.state_dict()["plan"] is None
    plan = policy.plan()
    assert policy.state_dict()["plan"] == {"explore": False, "blocks": sorted(plan.trainable)}
    state = policy.state_dict() | {"plan": {"explore": True, "blocks": list(range(BLOCKS))}}
    policy.load_state_dict(state)
    assert policy.plan() == Plan(ALL, None)


def test_a_length_that_was_left_open_is_that_of_the_first_epoch() -> None:
    policy = AdaGradSelect(fraction=0.3)
    with pytest.raises(UserError, match="explore_steps is not given"):
        policy.start(layers(BLOCKS))
    policy.complete(epoch_steps=40, run_steps=80)
    assert policy.explore_steps == 40
    chosen = AdaGradSelect(fraction=0.3, explore_steps=7)
    chosen.complete(epoch_steps=40, run_steps=80)
    assert chosen.explore_steps == 7


def test_a_copy_that_is_started_leaves_the_policy_as_it_is() -> None:
    policy = started(TopK(fraction=0.5), 4)
    run(policy, 3)
    before = policy.state_dict()
    twin = policy.started(layers(BLOCKS))
    run(twin, 5)
    assert (twin.blocks_per_step, policy.blocks_per_step) == (6, 2)
    assert policy.state_dict() == before


@pytest.mark.parametrize("name", METHODS)
def test_facts_about_a_method_are_on_its_class(name: str) -> None:
    policy = METHODS[name]
    assert policy.method == name
    assert policy.rule
    for flag, field in flags_of(policy).items():
        assert len(field.metadata["help"]) > 20, flag
