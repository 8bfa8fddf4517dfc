"""Training chosen elements equals a plain loop over whole weights in which the others are put back."""

from __future__ import annotations

import pytest
import torch

from tests.cases import launch_cases
from tests.elements.training_ranks import PARITY
from tests.tiny import WITHOUT_ELEMENTS, element_model, random_mask, tiny_model
from tests.zero.scenario import ElementReference, Record


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return launch_cases("tests/elements/training_ranks.py", tmp_path_factory.mktemp("elements"))


@pytest.fixture(scope="module")
def loss_tolerance() -> float:
    return 1e-6


@pytest.mark.parametrize("name", PARITY)
def test_equals_a_masked_loop_over_whole_weights(ranks: list[dict], loss_tolerance: float, name: str) -> None:
    scenario = PARITY[name]
    loop = ElementReference(scenario)
    reference = loop.run()
    run: Record = ranks[0][name]["record"]
    assert run.selected == reference.selected
    assert run.losses == pytest.approx(reference.losses, rel=0, abs=loss_tolerance)
    assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
    for norms, expected in zip(run.norms, reference.norms, strict=True):
        assert norms == pytest.approx(expected, rel=1e-5, abs=0)
    weights = ranks[0][name]["weights"]
    for weight, expected in loop.weights.items():
        assert torch.allclose(weights[weight].cpu(), expected.detach(), rtol=0, atol=1e-5), weight


@pytest.mark.parametrize("name", PARITY)
def test_elements_outside_stay_and_those_inside_move(ranks: list[dict], name: str) -> None:
    base = dict(tiny_model().named_parameters())
    mask = random_mask(tiny_model(), 0.1, WITHOUT_ELEMENTS)
    updated = {block for blocks in ranks[0][name]["record"].selected for block in blocks}
    for rank in ranks:
        for weight, before in base.items():
            after, chosen = rank[name]["weights"][weight].cpu(), mask.indices.get(weight)
            changed = (after != before).view(-1).nonzero().view(-1)
            if chosen is None or not any(f".{block}." in weight for block in updated):
                assert not len(changed), weight
            else:
                assert torch.equal(changed.int(), chosen), weight
                values = rank[name]["weights"][weight.replace(".weight", ".values")].cpu()
                assert torch.equal(values, after.view(-1)[chosen.long()])


@pytest.mark.parametrize("name", PARITY)
def test_optimizer_states_hold_the_elements_alone(ranks: list[dict], name: str) -> None:
    """Counted over the ranks; partitions are filled up to multiples of the ranks, at stage 3 each parameter."""
    values = [p.numel() for p in element_model().parameters() if p.requires_grad]
    held = sum(numel for rank in ranks for numel, _ in rank[name]["states"].values())
    assert sum(values) == random_mask(tiny_model(), 0.1, WITHOUT_ELEMENTS).numel
    assert sum(values) <= held <= sum(values) + 2 * len(ranks) * len(values)
    assert {block for _, block in ranks[0][name]["states"].values()} == {"layers.0", "layers.2", "layers.3"}


@pytest.mark.parametrize("name", PARITY)
def test_ranks_hold_equal_weights(ranks: list[dict], name: str) -> None:
    for rank in ranks[1:]:
        for weight, value in ranks[0][name]["weights"].items():
            assert torch.equal(rank[name]["weights"][weight], value), weight
