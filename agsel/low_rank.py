"""A linear layer with a LoRA adapter, computed in fewer steps than PEFT does, which adds two products and a scaling.

The adapter's product is accumulated onto that of the weight, so that nothing of the size of the layer's outputs is made
beside them, and an adapter that is frozen keeps no activations. It can also be folded: the product of its two matrices
is added to a copy of the weight for the moment, once per forward and once per backward.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class FusedLinear(Linear):
    """PEFT's linear layer with LoRA adapters; made from one by `agsel.adapters.fuse_adapters`.

    Attributes:
        folds: whether adapters are folded in training, where that is less arithmetic.
    """

    folds: bool

    def forward(self, inputs: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """As of PEFT's layer, which computes itself whatever is not one ordinary adapter on one ordinary layer."""
        if arguments or options or not self._is_ordinary(inputs):
            return super().forward(inputs, *arguments, **options)
        (name,) = self.active_adapters
        down, up, base = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer
        folded = self.folds and self.training and _is_less_folded(inputs, base.weight)
        product = _FoldedProduct if folded else _Product
        return product.apply(inputs, base.weight, base.bias, down, up, self.scaling[name])

    def _is_ordinary(self, inputs: Tensor) -> bool:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (name,) = self.active_adapters
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return False
        if type(self.base_layer) is not nn.Linear or _is_autocast(inputs):
            return False
        dropout, modules = self.lora_dropout[name], (self.base_layer, self.lora_A[name], self.lora_B[name])
        drops = self.training and getattr(dropout, "p", 0) > 0
        is_hooked = any(hooks for module in modules for hooks in _hooks_of(module))
        weights = [weight for module in modules for weight in module.parameters()]
        trains_base = any(weight.requires_grad for weight in self.base_layer.parameters())
        return not (drops or is_hooked or trains_base) and all(weight.dtype == inputs.dtype for weight in weights)


def _hooks_of(module: nn.Module) -> tuple[Any, ...]:
    backward = module._backward_pre_hooks, module._backward_hooks
    return module._forward_pre_hooks, module._forward_hooks, *backward


def _is_autocast(inputs: Tensor) -> bool:
    return not inputs.is_meta and torch.is_autocast_enabled(inputs.device.type)


def _is_less_folded(inputs: Tensor, weight: Tensor) -> bool:
    """Folding takes rank x outputs x inputs multiplications; two products, rank x (outputs + inputs) of each token."""
    outputs, width = weight.shape
    return outputs * width < inputs.numel() // width * (outputs + width)


class _Product(torch.autograd.Function):
    """`inputs @ (weight + scaling * up @ down).T + bias`; weight and bias are frozen.

    inputs [..., in], weight [out, in], bias [out] or None, down [rank, in], up [out, rank].
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        """Saves activations only for an adapter that trains."""
        outputs, reduced = functional.linear(inputs, weight, bias), functional.linear(inputs, down)
        outputs.view(-1, len(weight)).addmm_(_rows(reduced), up.t(), alpha=scaling)  # a copy would lose it
        trains_down, trains_up = ctx.needs_input_grad[3:5]
        ctx.scaling = scaling
        ctx.save_for_backward(weight, down, up, inputs if trains_down else None, reduced if trains_up else None)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """That of the inputs, and those of the adapter if it trains."""
        weight, down, up, inputs, reduced = ctx.saved_tensors
        rows = _rows(gradient)
        of_reduced = rows @ up
        of_inputs = of_down = of_up = None
        if ctx.needs_input_grad[0]:
            of_inputs = (rows @ weight).addmm_(of_reduced, down, alpha=ctx.scaling)
            of_inputs = of_inputs.view(*gradient.shape[:-1], weight.shape[1])
        if inputs is not None:
            of_down = (of_reduced.t() @ _rows(inputs)).mul_(ctx.scaling)
        if reduced is not None:
            of_up = (rows.t() @ _rows(reduced)).mul_(ctx.scaling)
        return of_inputs, None, None, of_down, of_up, None


class _FoldedProduct(torch.autograd.Function):
    """`_Product` with the sum of the matrices made first, in the type of the weight."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        """Saves activations only for an adapter that trains."""
        ctx.scaling = scaling
        ctx.save_for_backward(weight, down, up, inputs if any(ctx.needs_input_grad[3:5]) else None)
        return functional.linear(inputs, torch.addmm(weight, up, down, alpha=scaling), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """That of the inputs, and those of the adapter if it trains."""
        weight, down, up, inputs = ctx.saved_tensors
        of_inputs = of_down = of_up = None
        if ctx.needs_input_grad[0]:
            of_inputs = gradient @ torch.addmm(weight, up, down, alpha=ctx.scaling)
        if inputs is not None:
            rows, inputs = _rows(gradient), _rows(inputs)
            of_down = (rows @ up).t() @ inputs if ctx.needs_input_grad[3] else None
            of_up = rows.t() @ functional.linear(inputs, down) if ctx.needs_input_grad[4] else None
        scaled = (part if part is None else part.mul_(ctx.scaling) for part in (of_down, of_up))
        return of_inputs, None, None, *scaled, None


def _rows(tensor: Tensor) -> Tensor:
    """[..., width] as [rows, width]."""
    return tensor.reshape(-1, tensor.shape[-1])
