"""Which weights are trained by methods that train single ones: random ones, as time and memory do not depend on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

import agsel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All linear layers but the head by name: what PEFT calls "all-linear"."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def random_mask(model: PreTrainedModel, density: float) -> agsel.ElementMask:
    """Random elements of every linear layer, its share of the density; the same on all ranks."""
    weights = {f"{name}.weight": layer.weight for name, layer in linear_layers(model).items()}
    counts = {name: max(1, round(density * weight.numel())) for name, weight in weights.items()}
    return agsel.ElementMask(
        {name: random_places(weight, counts[name]) for name, weight in weights.items()},
        {name: tuple(weight.shape) for name, weight in weights.items()},
    )


def random_places(weight: torch.Tensor, count: int) -> torch.Tensor:
    """int32 [count], ascending, on the CPU: different positions in the flattened weight."""
    chosen = np.random.default_rng(0).choice(weight.numel(), count, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(chosen)).int()
