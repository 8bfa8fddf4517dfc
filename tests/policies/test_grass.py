"""GRASS against a plain loop that computes all gradients, their means and the probabilities itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from agsel.errors import UserError
from agsel.policies import BlockInfo, Grass
from tests.policies.running import assert_drawn_from, commit, norms_of, probability_of_set, run, sets_of, started
from tests.policies.training import (
    TOLERANCE,
    PlainLoop,
    assert_same_weights,
    attached,
    moved_blocks,
    train,
)
from tests.tiny import tiny_batch, tiny_model

PROBE, EVERY, REFRESH = 3, 4, 14
STEPS = 2 * REFRESH + PROBE + 1
"""Three measurings; in a period three sets are drawn, the last of which is cut short by the next."""
DRAWING = [start + step for start in (0, REFRESH, 2 * REFRESH) for step in (3, 7, 11) if start + step < STEPS]
WEIGHT_OF_THE_NEW = 0.1
DRAWS = 10_000


def softmax(values: np.ndarray, temperature: float | None) -> np.ndarray:
    """By default with the standard deviation over the blocks as the temperature."""
    if temperature is None:
        temperature = np.sqrt(np.mean((values - values.mean()) ** 2))
    exponentials = np.exp((values - values.max()) / temperature)
    return exponentials / exponentials.sum()


class MeasuringLoop(PlainLoop):
    """The plain loop with a mean of each block, and the probabilities wherever a set is drawn."""

    def __init__(self, temperature: float | None) -> None:
        super().__init__(tiny_model())
        self.temperature = temperature
        self.modes: list[str] = []
        self.losses: list[float] = []
        self.probabilities: dict[int, np.ndarray] = {}

    def train(self, selected: list[tuple[str, ...]]) -> None:
        """What is selected in the steps that update is given."""
        means = np.zeros(len(self.parameters))
        for step, names in enumerate(selected):
            self.losses.append(self.gradients(tiny_batch(step, 0, 0)))
            norms = np.array([self.root_mean_square(block) for block in self.parameters])
            place = step % REFRESH
            if place < PROBE:
                means = (place * means + norms) / (place + 1)
                self.modes.append("probe")
                continue
            if (place - PROBE) % EVERY == 0:
                self.probabilities[step] = softmax(means, self.temperature)
            updated = np.isin(list(self.parameters), names)
            means[updated] += WEIGHT_OF_THE_NEW * (norms - means)[updated]
            self.update(names)
            self.modes.append("exploit")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("temperature", [None, 0.02], ids=["default", "given"])
def test_equals_the_plain_loop(temperature: float | None) -> None:
    """Embedding, norm and head take part, so that blocks differ in size."""
    settings = {"probe_steps": PROBE, "every": EVERY, "refresh_every": REFRESH, "temperature": temperature}
    losses, selected, modes, probabilities = [], [], [], {}
    with attached(Grass(fraction=0.5, seed=3, **settings), tiny_model(), "all") as (engine, selection):
        for step in range(STEPS):
            if step in DRAWING:
                probabilities[step] = selection.policy.probabilities()
            losses.append(train(engine, tiny_batch(step, 0, 0)))
            selected.append(selection.last.selected)
            modes.append(selection.last.mode)
        plain = MeasuringLoop(temperature)
        plain.train(selected)
        assert modes == plain.modes
        assert list(plain.probabilities) == DRAWING
        for step, expected in plain.probabilities.items():
            assert probabilities[step] == pytest.approx(expected, rel=0, abs=1e-5)
        assert losses == pytest.approx(plain.losses, rel=0, abs=TOLERANCE)
        assert_same_weights(engine.module, plain.model)
        assert selection.counts == Counter(block for blocks in selected for block in blocks)
    assert [len(blocks) for blocks in selected] == [3 if mode == "exploit" else 0 for mode in modes]
    turns = [selected[step] for step in DRAWING]
    assert len(set(turns)) > 2
    assert moved_blocks(plain.model, tiny_model()) == {block for turn in turns for block in turn}
    held = [step for step in range(1, STEPS) if modes[step] == "exploit" and step not in DRAWING]
    assert all(selected[step] == selected[step - 1] for step in held)


SIZES = [100, 400, 25, 900]
MEANS = np.array([1.0, 1.5, 0.4, 1.1])


def step_with(policy: Grass, means: np.ndarray) -> tuple[int, ...]:
    """The blocks of `SIZES` that a step updates in which these are the root mean squares of their gradients."""
    return commit(policy, {block: means[block] * SIZES[block] ** 0.5 for block in policy.plan().trainable})


def measured(**settings: float | None) -> Grass:
    """A policy that has measured blocks of `SIZES`, and found `MEANS` on average."""
    policy = Grass(**{"fraction": 0.5, "probe_steps": 2, "every": 1, "refresh_every": 10**9, "seed": 4} | settings)
    policy.start([BlockInfo(f"layers.{index}", size) for index, size in enumerate(SIZES)])
    for share in (0.5, 1.5):
        assert not step_with(policy, share * MEANS)
    return policy


@pytest.mark.parametrize("temperature", [None, 0.3, 5.0])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_sets_are_drawn_by_the_softmax_of_root_mean_squares(temperature: float | None, k: int) -> None:
    policy = measured(fraction=k / 4, temperature=temperature)
    weights = softmax(MEANS, temperature)
    observed = Counter(step_with(policy, MEANS) for _ in range(DRAWS))
    assert_drawn_from(observed, {chosen: probability_of_set(chosen, weights) for chosen in sets_of(4, k)})


def test_only_blocks_that_were_updated_move_their_mean() -> None:
    policy = measured(temperature=1.0)
    means = MEANS.copy()
    for step in range(50):
        found = MEANS + step / 10
        for block in step_with(policy, found):
            means[block] = (1 - WEIGHT_OF_THE_NEW) * means[block] + WEIGHT_OF_THE_NEW * found[block]
        assert policy.probabilities() == pytest.approx(softmax(means, 1.0), rel=1e-12)


def test_new_probes_replace_the_means() -> None:
    policy = measured(refresh_every=6, temperature=1.0)
    for _ in range(4):
        assert step_with(policy, 9 * MEANS)
    for _ in range(2):
        assert not step_with(policy, 3 * MEANS)
    assert policy.probabilities() == pytest.approx(softmax(3 * MEANS, 1.0), rel=1e-12)


@pytest.mark.parametrize("norm", [0.0, 1.0, 2.5])
def test_equal_gradients_give_equal_chances(norm: float) -> None:
    """Whose standard deviation, the temperature, is zero but for the rounding of their mean."""
    policy = started(Grass(fraction=1 / 3, probe_steps=1, every=1, refresh_every=10**9), 3)
    assert not policy.commit(dict.fromkeys(range(3), norm)).blocks
    observed = Counter(commit(policy, dict.fromkeys(policy.plan().trainable, norm)) for _ in range(DRAWS))
    assert_drawn_from(observed, dict.fromkeys(sets_of(3, 1), 1 / 3))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_by_default_the_scale_of_the_gradients_does_not_matter(scale: float) -> None:
    policy = started(Grass(probe_steps=1))
    norms = norms_of(0)
    policy.commit({block: scale * norm for block, norm in norms.items()})
    assert policy.probabilities() == pytest.approx(softmax(np.array([*norms.values()]), None), rel=1e-6)


def test_a_tiny_temperature_draws_the_largest() -> None:
    policy = measured(temperature=1e-12)
    assert {step_with(policy, MEANS) for _ in range(100)} == {(1, 3)}


def test_the_defaults_probe_five_steps_of_five_hundred_and_hold_a_set_for_twenty_five() -> None:
    """With 40 of 80 blocks, two draws in a row never are the same by chance."""
    steps = run(started(Grass(fraction=0.5), 80), 560)
    chosen = [blocks for _, blocks in steps]
    assert [step for step, blocks in enumerate(chosen) if not blocks] == [*range(5), *range(500, 505)]
    assert all(plan.trainable == set(range(80)) for plan, blocks in steps if not blocks)
    changes = [step for step in range(1, 560) if chosen[step] != chosen[step - 1]]
    assert changes == [*range(5, 500, 25), 500, *range(505, 560, 25)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fraction": 0.0}, "--select_fraction"),
        ({"every": 0}, "--select_every"),
        ({"probe_steps": 0}, "--probe_steps"),
        ({"refresh_every": 5}, "--refresh_every"),
        ({"probe_steps": 500}, "--refresh_every|--probe_steps"),
        ({"temperature": 0.0}, "--temperature"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"seed": -1}, "--selection_seed"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Grass(**settings)


@pytest.mark.parametrize("steps", [PROBE - 1, PROBE, PROBE + 1])
def test_a_run_that_only_measures_is_told_so(steps: int) -> None:
    policy = started(Grass(fraction=0.5, probe_steps=PROBE))
    run(policy, steps)
    remark = policy.remark(steps)
    assert (remark is None) == any(policy.counts)
    assert remark is None or f"all {steps} steps only measure gradients" in remark


def test_a_refresh_just_longer_than_its_probes_is_accepted() -> None:
    kinds = [plan.kind for plan, _ in run(started(Grass(probe_steps=2, refresh_every=3)), 9)]
    assert kinds == ["probe", "probe", "exploit"] * 3


def test_continued_with_fewer_probing_steps_it_draws_from_what_was_measured() -> None:
    saved, continued = measured(probe_steps=10, every=5), measured(probe_steps=2, every=5)
    step_with(saved, MEANS)
    continued.load_state_dict(saved.state_dict())
    assert len(step_with(continued, MEANS)) == 2
