"""A linear layer of which only chosen elements are trained.

Its weight is frozen and holds the values of the chosen elements, too, from the end of one optimizer step to the next.
So forwards are those of the ordinary layer, and nothing of the size of the weight is kept beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from agsel.blocks import TrainedInPart
from agsel.elements.mask import ElementMask
from agsel.elements.whole_weights import whole
from agsel.errors import UserError


class _Product(torch.autograd.Function):
    """`linear(inputs, weight, bias)`, which has a gradient for some elements of the weight."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, _values: Tensor, indices: Tensor
    ) -> Tensor:
        """The values, which the weight holds already, are here for their gradient."""
        ctx.save_for_backward(inputs, weight, indices)
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, None]:
        """That of the inputs, and that of the weight at the indices, of which all is there for a moment."""
        inputs, weight, indices = ctx.saved_tensors
        inputs, weight = inputs.to(gradient.dtype), weight.to(gradient.dtype)  # under autocast they have another type
        of_inputs = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = gradient.reshape(-1, gradient.shape[-1]).t() @ inputs.reshape(-1, inputs.shape[-1])
        return of_inputs, None, None, of_weight.flatten().index_select(0, indices), None


class ElementLinear(TrainedInPart, nn.Linear):
    """A linear layer whose trainable parameter is `values`; made from one by `use_elements`.

    Attributes:
        values: [k], the chosen elements themselves, not differences.
        indices: int32 [k], their positions in the flattened weight, ascending.
    """

    values: nn.Parameter
    indices: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """As of `nn.Linear`."""
        if not (self.values.requires_grad and torch.is_grad_enabled()):
            return functional.linear(inputs, self.weight, self.bias)
        return _Product.apply(inputs, self.weight, self.bias, self.values, self.indices)

    @torch.no_grad()
    def write(self) -> None:
        """Write the values into the weight."""
        self.weight.view(-1).scatter_(0, self.indices, self.values)


def use_elements(model: nn.Module, mask: ElementMask) -> None:
    """Train the chosen elements of a model's weights and nothing else. Call it before `agsel.block_param_groups`.

    Every linear layer with chosen elements becomes an `ElementLinear`, in place. All other parameters are frozen.
    Every rank must call it.

    Args:
        model: on every rank the same, also if ZeRO-3 has partitioned it; not yet in an engine.
        mask: of this model, the same on all ranks.

    Raises:
        UserError: the mask is of another model or on other ranks another, or not valid, or the weights are quantised,
            adapted or shared.
    """
    require_equal_masks(mask)
    add_values(model, mask)


def require_equal_masks(mask: ElementMask) -> None:
    """Refuse masks that differ between the ranks: DeepSpeed would fail at their sizes, or not see it at all.

    Raises:
        UserError: on every rank.
    """
    if not dist.is_initialized():
        return
    masks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(masks, f"{mask.numel:,} elements ({mask.checksum:08x})")
    if len({*masks}) > 1:
        raise UserError(f"the ranks have different masks: {' and '.join(masks)}; give every rank the same one")


def add_values(model: nn.Module, mask: ElementMask) -> None:
    """What `use_elements` does on one rank."""
    mask.require_valid()
    layers = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in mask.indices:
        if name not in layers:
            raise UserError(f"the mask is of another model: this one has no linear layer with the weight {name}")
        require_plain(name, layers[name])
        require_shape(name, (layers[name].out_features, layers[name].in_features), mask)
    require_own(model, mask.indices)
    model.requires_grad_(False)
    for name, indices in mask.indices.items():
        layer = layers[name]
        with whole(layer.parameters()):
            indices = indices.to(layer.weight.device)
            values = layer.weight.detach().flatten().index_select(0, indices)
        layer.__class__ = ElementLinear
        layer.register_buffer("indices", indices, persistent=False)
        layer.register_parameter("values", nn.Parameter(values))


def require_shape(name: str, shape: Sequence[int], mask: ElementMask) -> None:
    """Refuse the mask of another model.

    Raises:
        UserError: names both shapes.
    """
    if tuple(shape) != mask.shapes[name]:
        there, here = (" x ".join(map(str, sizes)) for sizes in (mask.shapes[name], shape))
        raise UserError(f"the mask is of another model: {name} is {there} there and {here} here")


def require_plain(name: str, layer: nn.Module) -> None:
    """Refuse what only looks like a linear layer.

    Raises:
        UserError: its weight is not one of single elements, or it has elements already.
    """
    if isinstance(layer, ElementLinear):
        raise UserError(f"{name} has trained elements already: call agsel.use_elements once, on a freshly loaded model")
    if type(layer) is not nn.Linear:
        raise UserError(
            f"{name} belongs to a {type(layer).__name__}: single weights are trained in ordinary linear layers only, "
            "so load the model without quantisation (--load_in_4bit, --load_in_8bit) and without adapters"
        )


def require_own(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse adapters, and weights that are used elsewhere, too, where their elements would not be trained.

    Raises:
        UserError: says which.
    """
    if any(hasattr(module, "peft_config") for module in model.modules()):
        raise UserError("the model has adapters: train those or single weights (--use_peft, --elements), not both")
    names_of: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names_of.setdefault(id(parameter), []).append(name)
    for name in names:
        if len(shared := names_of[id(parameters[name])]) > 1:
            raise UserError(
                f"{' and '.join(shared[:2])} are the same weight: single weights are trained only where layers share "
                "none, so use another model"
            )


def element_layers(model: nn.Module) -> dict[str, ElementLinear]:
    """The layers with chosen elements, by the name of their weight."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, ElementLinear)}


def mask_of(model: nn.Module) -> ElementMask:
    """The mask that a model was given by `use_elements`."""
    layers = element_layers(model)
    return ElementMask(
        {name: layer.indices.cpu() for name, layer in layers.items()},
        {name: (layer.out_features, layer.in_features) for name, layer in layers.items()},
    )
