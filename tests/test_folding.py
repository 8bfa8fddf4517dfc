"""tools/quality/folding.py: what folding loses is measured, masters keep what bf16 does not, both arms in one table."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from agsel.errors import UserError
from agsel.low_rank import _is_less_folded
from tests.tiny import tiny_model
from tests.tiny_run import save_model, save_rows
from tools.quality import folding

RANK = 4
ROWS = [folding.Row([5, 6, 7, 8], 2), *[folding.Row([5, 6, 7, 8, 9, 10], 3)] * 4]


def small_model() -> Any:
    return folding.adapted_model(tiny_model(layers=2, dtype=torch.bfloat16), RANK)


@torch.no_grad()
def changed_model(weight: float, change: float) -> Any:
    """With weights of this size and random signs, and adapters that add `change` to all of them."""
    model = small_model()
    for layer in folding.adapted_layers(model):
        layer.base_layer.weight.sign_().mul_(weight)
        layer.lora_A.default.weight.fill_(1.0)
        layer.lora_B.default.weight.fill_(change / RANK)
    return model


def test_answers_alone_have_labels() -> None:
    batch = folding.batch_of(ROWS[:2])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0], [5, 6, 7, 8, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, -100, -100], [-100] * 3 + [8, 9, 10]]


def test_the_loss_is_the_mean_over_all_answers() -> None:
    model = tiny_model()
    whole = model(**folding.batch_of(ROWS)).loss.item()
    assert folding.loss_of(model, folding.batches_of(ROWS, 1)) == pytest.approx(whole, rel=1e-6)


# The numbers of bf16 from 1 to 2 are 1 / 128 apart.
@pytest.mark.parametrize(
    ("change", "kept", "error"), [(1 / 512, 0, 1), (3 / 512, 4 / 3, 1 / 3), (5 / 512, 4 / 5, 1 / 5), (1 / 128, 1, 0)]
)
def test_what_rounding_leaves(change: float, kept: float, error: float) -> None:
    layers = folding.adapted_layers(changed_model(1.5, change))
    assert len(layers) == 14
    assert folding.rounding(layers) == pytest.approx((kept, error))


def test_a_change_that_rounding_wipes_out_is_in_no_folded_loss() -> None:
    without, model = changed_model(1.5, 0.0), changed_model(1.5, 1 / 512)
    heldout = [folding.batch_of(ROWS)]
    before = copy.deepcopy(model.state_dict())
    unfolded, folded, exact = folding.losses_of(model, heldout)
    assert folded == folding.loss_of(without, heldout)
    assert folded not in (unfolded, exact)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@torch.no_grad()
def test_a_change_that_bf16_holds_is_in_all_losses() -> None:
    model, heldout = small_model(), [folding.batch_of(ROWS)]
    without = folding.loss_of(model, heldout)
    for layer in folding.adapted_layers(model):
        layer.lora_B.default.weight.normal_()
    unfolded, folded, exact = folding.losses_of(model, heldout)
    assert [unfolded, folded] == pytest.approx([exact] * 2, abs=0.1 * abs(exact - without))


def test_every_layer_folds_from_the_number_of_tokens_that_is_asked_for() -> None:
    layers = folding.adapted_layers(small_model())
    needed = folding.tokens_to_fold(layers)

    def fold(tokens: int) -> bool:
        weights = [layer.base_layer.weight for layer in layers]
        return all(_is_less_folded(torch.zeros(1, tokens, weight.shape[1]), weight) for weight in weights)

    assert fold(needed)
    assert not fold(needed - 1)
    folding.require_folding(layers, [folding.batch_of(ROWS)])
    with pytest.raises(UserError, match=f"batches of {needed} tokens and more, and one has 4: raise --batch_rows, or"):
        folding.require_folding(layers, folding.batches_of(ROWS, 1))


@pytest.mark.parametrize("folds", [False, True])
def test_an_arm_trains_on_the_loss_of_its_own_way(folds: bool) -> None:
    model, batch = changed_model(1.5, 1 / 512), folding.batch_of(ROWS)
    losses = folding.losses_of(model, [batch])
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert folding.Arm(model, folds, learning_rate=1e-3).step(batch) == pytest.approx(losses[folds], rel=1e-5)


@torch.no_grad()
def test_masters_keep_the_steps_that_bf16_rounds_away() -> None:
    model = small_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.fill_(1.0)
    arm = folding.Arm(model, False, learning_rate=2e-3)
    moved = []
    for _ in range(4):
        with torch.enable_grad():
            arm.step(folding.batch_of(ROWS))
        assert all(torch.equal(p, m.bfloat16()) for p, m in zip(trained, arm.masters, strict=True))
        moved.append(any((parameter != 1).any() for parameter in trained))
    assert moved[0] is False
    assert moved[-1] is True


def table_of(folder: Path, capsys: pytest.CaptureFixture[str], *steps: str) -> list[list[str]]:
    model, rows = folder / "model", folder / "rows.jsonl"
    sizes = ["--rank", "4", "--batch_rows", "8", "--heldout_rows", "8", "--learning_rate", "0.1"]
    words = ["--model", str(model), "--rows", str(rows), *sizes, "--measure_at", *steps]
    folding.compare(folding.parser().parse_args(words))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]


def test_both_arms_are_in_the_table_and_the_same_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model")
    save_rows(tmp_path / "rows.jsonl")
    table = table_of(tmp_path, capsys, "0", "2")
    arms = [["0", "unfolded"], ["0", "folded"], ["2", "unfolded"], ["2", "folded"]]
    assert [row[:2] for row in table[2:]] == arms
    start, again, unfolded, folded = (row[2:] for row in table[2:])
    assert start == again  # as text, since nothing is changed yet: 0 / 0
    assert start[0] == start[1]
    assert float(unfolded[0]) < float(start[0]) > float(folded[1])
    assert table_of(tmp_path, capsys, "0", "2") == table
    with pytest.raises(UserError, match="has 32 rows of at most 200 tokens, and 48 are needed: raise --most_tokens"):
        table_of(tmp_path, capsys, "5")
