"""Trained elements as a file: far smaller than the model, and put onto its base again bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agsel.elements.layer import element_layers, require_shape
from agsel.elements.mask import INDICES, VALUES, ElementMask, read, write
from agsel.errors import UserError, said_of


def export_elements(model: nn.Module, weights: Mapping[str, Tensor], path: Path, about: Mapping[str, Any]) -> None:
    """Write indices and values: 4 bytes for each element, and those of its type.

    Args:
        model: with elements.
        weights: its whole weights by name, as at the end of training.
        path: of the file, complete or absent.
        about: where it comes from; `base_model` is what `load_elements` belongs to. `dtype`, in which the base must be
            loaded for it, is that of the weights.
    """
    layers = element_layers(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[name + INDICES] = layer.indices.cpu()
        tensors[name + VALUES] = weights[name].detach().cpu().flatten().index_select(0, layer.indices.cpu())
    dtype = str(weights[next(iter(layers))].dtype).removeprefix("torch.")
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    write(path, tensors, shapes, {**about, "dtype": dtype})


@torch.no_grad()
def load_elements(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Put trained elements onto their base model, which becomes the trained one: bit for bit, if loaded in its type.

    Args:
        model: the base model.
        path: the `elements.safetensors` of a run.

    Returns:
        Where the elements come from: `base_model`, `method` and more.

    Raises:
        UserError: the file is none of elements, or of another model.
    """
    tensors, shapes, about = read(Path(path), INDICES, VALUES)
    indices = {name.removesuffix(INDICES): tensor for name, tensor in tensors.items() if name.endswith(INDICES)}
    mask = ElementMask(indices, shapes, about)
    with said_of(str(path)):
        mask.require_valid()
    for name, own in indices.items():
        if name + VALUES not in tensors or tensors[name + VALUES].shape != own.shape:
            raise UserError(f"{path} has no value for each element of {name}: use a file of trained elements")
    parameters = dict(model.named_parameters())
    for name in mask.indices:
        if name not in parameters:
            raise UserError(f"{path} is of another model: this one has no weight {name}{_base(about)}")
        require_shape(name, parameters[name].shape, mask)
    for name, own in mask.indices.items():
        weight = parameters[name]
        values = tensors[name + VALUES].to(weight.device, weight.dtype)
        weight.view(-1).scatter_(0, own.to(weight.device), values)
    return about


def base_of(path: Path) -> dict[str, str]:
    """The base model of a file of elements: `base_model`, and if it tells them `revision` and the `dtype` of training.

    Raises:
        UserError: it is no such file, has no values, or names none.
    """
    values, _, about = read(path, VALUES)
    if not values:
        raise UserError(f"{path} has no trained values: use the elements.safetensors that a run writes at its end")
    if not isinstance(about.get("base_model"), str):
        raise UserError(f"{path} names no base model: load that yourself and call agsel.load_elements(model, {path})")
    return {name: value for name in ("base_model", "revision", "dtype") if isinstance(value := about.get(name), str)}


def _base(about: Mapping[str, Any]) -> str:
    return f"; it is of {json.dumps(about['base_model'])}" if "base_model" in about else ""
