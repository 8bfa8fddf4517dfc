"""Compiled layers: four graphs for all of them, the same gradients, whatever is frozen."""

from __future__ import annotations

import random

import pytest
import torch

import agsel
from agsel.blocks import decoder_layers
from tests.tiny import tiny_batch, tiny_model

LAYERS = 6


def unique_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def gradients(model: torch.nn.Module, chosen: set[int], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the chosen layers, everything else frozen."""
    model.zero_grad()
    model.requires_grad_(False)
    for index in chosen:
        decoder_layers(model)[index].requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def compiled() -> torch.nn.Module:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(layers=LAYERS)
    agsel.compile_layers(model, backend="aot_eager")
    return model


def test_four_graphs_serve_every_choice_of_blocks(compiled: torch.nn.Module) -> None:
    eager = tiny_model(layers=LAYERS)
    draw = random.Random(0)
    chosen = [{0, 1}, {2, 4}] + [set(draw.sample(range(LAYERS), 2)) for _ in range(20)]
    for number, layers in enumerate(chosen):
        ids = tiny_batch(number, 0, 0)
        own, expected = gradients(compiled, layers, ids), gradients(eager, layers, ids)
        assert own.keys() == expected.keys()
        for name in own:
            torch.testing.assert_close(own[name], expected[name], rtol=1e-5, atol=1e-7)
        assert unique_graphs() <= 4
    assert unique_graphs() == 4


def test_other_lengths_make_four_more_graphs(compiled: torch.nn.Module) -> None:
    draw = random.Random(0)
    for length in (12, 12, 12, 12, 9, 9, 9, 9, 11, 8, 10, 7, 6):
        for _ in range(6):
            gradients(compiled, set(draw.sample(range(LAYERS), 2)), tiny_batch(0, 0, 0)[:, :length])
    assert unique_graphs() == 8


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no decoder layers found"):
        agsel.compile_layers(torch.nn.Linear(2, 2))
