"""A tiny model that trains on one rank: with agsel under DeepSpeed, or by a plain loop that is told what to update."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import agsel
from tests.tiny import tiny_batch
from tests.zero.scenario import ADAM, Scenario, start_engine

TOLERANCE = 1e-6
"""Of losses and weights: fp32, summed in another order."""
AROUND_THE_LAYERS = {"model.embed_tokens.weight": "embed", "model.norm.weight": "final_norm", "lm_head.weight": "head"}


def block_of(parameter: str) -> str:
    """The block that a parameter of a Llama is in, by its name."""
    layer = re.search(r"layers\.\d+", parameter)
    return layer[0] if layer else AROUND_THE_LAYERS[parameter]


@contextmanager
def attached(policy: agsel.Policy, model: nn.Module, blocks: str = "layers") -> Iterator[tuple[Any, Any]]:
    """An engine over the model, and the selection on it."""
    engine, selection = start_engine(Scenario(stage=2, blocks=blocks, policy=lambda: policy), model=model)
    try:
        yield engine, selection
    finally:
        engine.destroy()


def train(engine: Any, ids: torch.Tensor) -> float:
    """One optimizer step of the engine; the loss before it."""
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return loss.item()


class PlainLoop:
    """Full gradients, and an AdamW of its own for each block."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            self.parameters.setdefault(block_of(name), []).append(parameter)
        self._optimizers: dict[str, torch.optim.AdamW] = {}

    def gradients(self, ids: torch.Tensor) -> float:
        """Compute them anew; the loss."""
        self.model.zero_grad()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item()

    def root_mean_square(self, block: str) -> float:
        """Of the block's gradient."""
        gradient = torch.cat([parameter.grad.flatten().double() for parameter in self.parameters[block]])
        return gradient.square().mean().sqrt().item()

    def update(self, blocks: Iterable[str]) -> None:
        """Step these blocks' optimizers, whose moments go on."""
        for block in blocks:
            if block not in self._optimizers:
                self.start_anew(block)
            self._optimizers[block].step()

    def start_anew(self, block: str) -> None:
        """Forget the moments and the step count of a block."""
        self._optimizers[block] = torch.optim.AdamW(self.parameters[block], **ADAM)


class FreezingLoop(PlainLoop):
    """One AdamW over all weights, of which blocks are frozen and thawed; none of its states is ever forgotten."""

    def train(self, trained: Sequence[set[str]]) -> list[float]:
        """The losses of as many steps, each of which trains these blocks alone."""
        optimizer = torch.optim.AdamW(self.model.parameters(), **ADAM)
        losses = []
        for step, blocks in enumerate(trained):
            for block, parameters in self.parameters.items():
                for parameter in parameters:
                    parameter.requires_grad_(block in blocks)
            losses.append(self.gradients(tiny_batch(step, 0, 0)))
            optimizer.step()
        return losses


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    for (name, weight), reference in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, reference, rtol=0, atol=TOLERANCE, msg=lambda text, n=name: f"{n}: {text}")


def moved_blocks(model: nn.Module, start: nn.Module) -> set[str]:
    """The blocks of which some weight has moved by far more than the tolerance."""
    before = dict(start.named_parameters())
    return {
        block_of(name)
        for name, weight in model.named_parameters()
        if (weight - before[name]).abs().max() > 100 * TOLERANCE
    }
