"""A run that was saved by 2 ranks and continued by 1 or 4 equals one that went on with 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import launch_cases
from tests.tiny import WITHOUT_ELEMENTS, random_mask, tiny_model
from tests.zero.universal_ranks import RUNS, SCRAMBLED

SCRIPT = "tests/zero/universal_ranks.py"
Results = dict[int, list[dict[str, Any]]]

BOTH_FAMILIES = [run for run in RUNS if not run.endswith("-1")]
"""Stages 1 and 2 are one class, but for how they keep gradients."""
MASK = random_mask(tiny_model(), 0.1, WITHOUT_ELEMENTS)
"""Of `element_model`."""
CASES = {
    2: (
        *(f"unbroken-{run}" for run in RUNS),
        *(f"{case}-{run}" for run in BOTH_FAMILIES for case in ("half_precision_saved", "trained_only_saved")),
        "without_agsel",
    ),
    4: (
        *(f"continued-{run}" for run in RUNS),
        *(f"{case}-{run}" for run in BOTH_FAMILIES for case in ("half_precision_loaded", "trained_only", "warm_start")),
        *(f"warm_start_same_ranks-{run}" for run in RUNS if run.endswith("-3")),
        "warm_start_over_all_blocks",
        "no_optimizer-adagradselect-2",
        "no_optimizer-elements-2",
        "refusals",
    ),
    1: tuple(f"{case}-{run}" for run in RUNS for case in ("continued", "chained")),
}
CONTINUED = [(4, "continued"), (1, "continued"), (1, "chained")]
pytestmark = pytest.mark.slow  # tests/test_launch.py has the way from two ranks to four by default
REFUSED = {
    "no latest": "empty holds no checkpoint: it has no file named latest",
    "no folder": "global_step1 holds no checkpoint of ZeRO stage 2",
    "other stage": "holds no checkpoint of ZeRO stage 2",
    "incomplete": "is incomplete: 2 ranks saved it, it has 1 *_optim_states.pt",
    "truncated": "could not be converted for another number of ranks (RuntimeError: Pytorch",
    "stock": "saved by 2 ranks without agsel",
    "changed converter": "differs from the tested 0.19.8 in deepspeed.checkpoint.ds_to_universal:main",
    "other blocks": "the saved selection is over 4 blocks (layers.0 ...), this run's over 7",
    "no optimizer states": "load_optimizer_states=False is not supported at ZeRO stage 3",
    "load_universal": "checkpoint.load_universal is not supported: remove it",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("universal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGSEL_TEST_CHECKPOINTS", str(folder))
        return {ranks: launch_cases(SCRIPT, folder / f"{ranks}-ranks", *CASES[ranks], ranks=ranks) for ranks in CASES}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("ranks", "case"), CONTINUED)
def test_continued_equals_unbroken(runs: Results, run: str, ranks: int, case: str) -> None:
    unbroken = runs[2][0][f"unbroken-{run}"]
    for rank in runs[ranks]:
        actual = rank[f"{case}-{run}"]
        for step, expected in zip(actual["steps"], unbroken["steps"][-len(actual["steps"]) :], strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], abs=1e-6, rel=0)
            assert {**step, "loss": 0} == {**expected, "loss": 0}  # selections, modes, counts, learning rates
        for key in ("adam steps", "param groups", "counts", "global steps"):
            assert actual["end"][key] == unbroken["end"][key], key
        for name, weights in unbroken["end"]["weights"].items():
            torch.testing.assert_close(actual["end"]["weights"][name], weights, atol=1e-7, rtol=0)
        for block, (master, *moments) in unbroken["end"]["states"].items():
            torch.testing.assert_close(actual["end"]["states"][block][0], master, atol=1e-7, rtol=0)
            torch.testing.assert_close(actual["end"]["states"][block][1:], torch.stack(moments), atol=1e-8, rtol=0)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("ranks", "case"), CONTINUED)
def test_nothing_is_lost_by_the_conversion(runs: Results, run: str, ranks: int, case: str) -> None:
    """Bit for bit, right after the load."""
    saved = runs[4][0][f"continued-{run}"] if case == "chained" else runs[2][0][f"unbroken-{run}"]
    for number, rank in enumerate(runs[ranks]):
        after_load = rank[f"{case}-{run}"]["after load"]
        require_equal(after_load, saved["at save"])
        assert after_load["mine"] == (None if case == "chained" else 42)
        assert not after_load["linked"]
        assert 0 < len(after_load["resident"]) < len(after_load["counts"])
        assert after_load["left over"] == []
        told = [message for message in after_load["messages"] if message.startswith("converted ")]
        assert len(told) == (number == 0)
        if told:
            folder = Path(after_load["path"]).parent
            assert told == [f"converted {folder} saved by {4 if case == 'chained' else 2} ranks for {ranks}"]
            assert folder.is_dir()


@pytest.mark.parametrize("run", RUNS)
def test_the_save_was_hard(runs: Results, run: str) -> None:
    """A block had never been selected, others had different Adam steps and settings and were evicted."""
    unbroken = runs[2][0][f"unbroken-{run}"]
    at_save = unbroken["at save"]
    assert 0 in at_save["counts"].values()
    assert len({*at_save["counts"].values()}) > 2
    assert at_save["adam steps"] == {name: {count} for name, count in at_save["counts"].items()}
    assert len(at_save["resident"]) < len(at_save["counts"])
    assert len({group["weight_decay"] for group in at_save["param groups"]}) > 1
    assert len({group["lr"] for group in at_save["param groups"]}) > 1
    assert {"explore", "exploit"} == {step["mode"] for step in unbroken["steps"]}


@pytest.mark.parametrize("run", BOTH_FAMILIES)
def test_half_precision(runs: Results, run: str) -> None:
    saved = runs[2][0][f"half_precision_saved-{run}"]
    assert saved["loss scale"] > 2**8
    for rank in runs[4]:
        require_equal(rank[f"half_precision_loaded-{run}"], saved)


@pytest.mark.parametrize("run", BOTH_FAMILIES)
def test_saved_without_frozen_weights(runs: Results, run: str) -> None:
    """As for PEFT models: this run's own stay."""
    saved = runs[2][0][f"trained_only_saved-{run}"]
    for rank in runs[4]:
        loaded = rank[f"trained_only-{run}"]
        for name, weights in saved["weights"].items():
            expected = as_loaded(name, weights, run)
            assert torch.equal(loaded["weights"][name], expected), name
        assert loaded["adam steps"] == saved["adam steps"]


@pytest.mark.parametrize("run", BOTH_FAMILIES)
def test_weights_alone(runs: Results, run: str) -> None:
    saved = runs[2][0][f"unbroken-{run}"]["at save"]
    for rank in runs[4]:
        warm = rank[f"warm_start-{run}"]
        require_equal_weights(warm, saved)
        assert set(warm["counts"].values()) == {0}
        assert list(warm["adam steps"].values()) == [{0}] * len(saved["states"])
        assert warm["global steps"] == 0


@pytest.mark.parametrize("run", [run for run in RUNS if run.endswith("-3")])
def test_weights_alone_on_the_ranks_that_saved_them(runs: Results, run: str) -> None:
    """DeepSpeed itself loads none at stage 3."""
    for rank in runs[4]:
        require_equal_weights(rank[f"warm_start_same_ranks-{run}"], rank[f"continued-{run}"]["at save"])


def test_weights_that_were_frozen_can_be_trained(runs: Results) -> None:
    saved = runs[2][0]["unbroken-adagradselect-3"]["at save"]["weights"]
    for rank in runs[4]:
        warm = rank["warm_start_over_all_blocks"]
        for name, weights in saved.items():
            assert torch.equal(warm["weights"][name], weights), name
        assert torch.equal(warm["states"]["head"][0], saved["lm_head.weight"].flatten())


@pytest.mark.parametrize("run", [run for run in RUNS if run.endswith("-2")])
def test_no_optimizer_states(runs: Results, run: str) -> None:
    saved = runs[2][0][f"unbroken-{run}"]["at save"]
    for rank in runs[4]:
        loaded = rank[f"no_optimizer-{run}"]
        require_equal_weights(loaded, saved)
        assert loaded["counts"] == saved["counts"]
        assert list(loaded["adam steps"].values()) == [{0}] * len(saved["states"])


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_on_every_rank(runs: Results, case: str) -> None:
    for rank in runs[4]:
        message = rank["refusals"][case]
        assert message is not None, "it was loaded"
        assert REFUSED[case] in message
        assert "\n" not in message
        assert rank["refusals"]["left over"] == ""


def as_loaded(name: str, saved: torch.Tensor, run: str) -> torch.Tensor:
    """A weight that was saved, where the checkpoint has none of those that were frozen, but values of elements."""
    if name.endswith(".values") or (not run.startswith("elements") and ".layers." in name):
        return saved
    own = torch.full_like(saved, SCRAMBLED)
    if run.startswith("elements") and name in MASK.indices:
        indices = MASK.indices[name].long()
        own.view(-1)[indices] = saved.view(-1)[indices]
    return own


def require_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    require_equal_weights(actual, expected)
    for block, states in expected["states"].items():
        assert torch.equal(actual["states"][block], states), block
    for key in ("adam steps", "param groups", "counts", "global steps", "lr", "loss scale"):
        assert actual[key] == expected[key], key


def require_equal_weights(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, weights in expected["weights"].items():
        assert torch.equal(actual["weights"][name], weights), name
    for block, states in expected["states"].items():
        assert torch.equal(actual["states"][block][0], states[0]), block
