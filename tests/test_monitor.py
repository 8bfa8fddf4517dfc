"""Status line and scalars of the selection."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import sys

import pytest

from agsel.monitor import block_ranges, count_levels, normalised_entropy, selection_scalars, status_line, tag_of
from agsel.policies import METHODS
from agsel.training import callback
from agsel.training.callback import warning_of


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["layers.3", "layers.7", "layers.8", "layers.9"], "layers 3,7-9"),
        (["embed", "layers.0", "layers.1", "final_norm", "head"], "embed layers 0-1 final_norm head"),
        (["final_norm"], "final_norm"),
        ([], ""),
    ],
)
def test_blocks_are_shown_in_ranges(names: list[str], text: str) -> None:
    assert block_ranges(names) == text


def test_the_status_line_is_aligned_and_leaves_out_what_is_unknown() -> None:
    numbers = {"loss": 1.43213, "learning_rate": 4e-4, "entropy": 2.0}
    assert (
        status_line(5, 1200, numbers, "exploit  layers 3")
        == "step    5/1200  loss 1.4321  lr 4.00e-04  exploit  layers 3"
    )
    assert status_line(5, 9, {"eval_loss": 2.0}) == "step 5/9  eval loss 2.0000"
    costs = {"speed/mfu": 0.431, "memory/peak_gb": 18.66, "speed/tokens_per_second": 12345.6, "epoch": 0.5}
    line = "step 5/9  epoch 0.50  12,346 tok/s  MFU 43%  peak 18.7 GB  0:01:05, 1:00:00 left"
    assert status_line(5, 9, costs, times=(65.2, 3600)) == line
    of_task = {"eval_gsm8k_nll": 0.5, "eval_gsm8k_accuracy": 0.125, "eval_mean_token_accuracy": 0.5}
    assert status_line(5, 9, of_task) == "step 5/9  gsm8k nll 0.5000  gsm8k accuracy 12.5%"
    of_datasets = {"eval_first_loss": 2.0, "eval_first_mean_token_accuracy": 0.5, "eval_second_loss": 3.0}
    assert status_line(5, 9, of_datasets) == "step 5/9  first loss 2.0000  second loss 3.0000"


def test_a_terminal_without_letters_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    callback._say("blocks    ▁█ \N{LATIN SMALL LETTER E WITH ACUTE}")
    terminal.seek(0)
    assert terminal.read() == "blocks    ?? \N{LATIN SMALL LETTER E WITH ACUTE}\n"


def test_entropy_is_one_for_even_and_zero_for_single_choices() -> None:
    assert normalised_entropy([5, 5, 5, 5]) == pytest.approx(1, abs=1e-12)
    assert normalised_entropy([0, 9, 0]) == 0
    assert normalised_entropy([3, 1]) == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)), abs=1e-12)
    assert normalised_entropy([0, 0]) == normalised_entropy([4]) == 1


def test_scalars_tell_who_was_chosen_how_and_by_which_norm() -> None:
    scalars = selection_scalars(
        counts={"embed": 0, "layers.0": 2, "layers.1": 2},
        selected=["layers.1", "layers.0"],
        norms={"layers.0": 0.5, "layers.1": math.nan},
        explored=0.25,
        skipped=3,
        epsilon=0.5,
    )
    assert scalars == {
        "selection/blocks": 2,
        "selection/explored": 0.25,
        "selection/epsilon": 0.5,
        "selection/entropy": pytest.approx(math.log(2) / math.log(3)),
        "selection/lowest_block": 1,
        "selection/skipped_steps": 3,
        "block_norm/layers.0": 0.5,
    }


def test_a_skipped_step_has_no_lowest_block_and_a_policy_without_epsilon_shows_none() -> None:
    scalars = selection_scalars(counts={"layers.0": 0}, selected=[], norms={}, explored=0, skipped=0)
    assert "selection/lowest_block" not in scalars
    assert "selection/epsilon" not in scalars


def test_counts_are_bars() -> None:
    assert count_levels({"embed": 0, "layers.0": 1, "layers.1": 50, "layers.2": 100}) == (
        "embed layers 0-2 ▁▂▅█, 0 to 100 times each"
    )
    assert count_levels({"layers.0": 0}) == "layers 0 ▁, 0 to 0 times each"


def test_blocks_that_were_left_out_are_named_with_the_setting_to_change() -> None:
    spread_by = METHODS["adagradselect"].spread_by
    assert "--dirichlet_delta" in spread_by
    counts = dict.fromkeys(["layers.0", "layers.1", "layers.2"], 5)
    assert warning_of(counts, spread_by) is None
    idle = warning_of(counts | {"layers.1": 0}, spread_by)
    assert idle == f"never trained: layers 1, 1 of 3 blocks: {spread_by}"
    single = warning_of(counts | {"layers.0": 0, "layers.2": 0}, spread_by)
    assert single == f"layers 1 took 5 of 5 turns of 3 blocks: {spread_by}"
    nearly = warning_of(dict(zip(counts, (95, 3, 2), strict=True)), spread_by)
    assert nearly == f"layers 0 took 95 of 100 turns of 3 blocks: {spread_by}"
    assert warning_of({"layers.0": 7}, spread_by) is None
    nothing = warning_of(dict.fromkeys(counts, 0), spread_by)
    assert nothing == "nothing was trained: every step was skipped, or only measured"


def test_what_a_remedy_names_is_a_setting_of_its_method() -> None:
    for name, policy in METHODS.items():
        flags = {field.metadata.get("flag") or field.name for field in dataclasses.fields(policy)}
        named = set(re.findall(r"--(\w+)", policy.spread_by))
        assert named <= flags, name


def test_tags_are_grouped() -> None:
    tags = {"loss": "train/loss", "eval_loss": "eval/loss", "speed/mfu": "speed/mfu", "eval_a_nll": "eval/a_nll"}
    assert {name: tag_of(name) for name in tags} == tags
