"""The widest activation of a trained layer is made again in the backward, instead of being kept from the forward on.

The last product of an MLP keeps its input for the gradient of its weight: the elementwise product of what the products
before it have given, which are kept anyway. It is made again by the MLP's own code, in one elementwise kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

LAST = "down_proj"
"""As transformers names an MLP's last product."""


def recompute_inputs(layers: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Let the MLPs of these layers make the input of their last product again; where that is not exact, they keep it.

    Whether it is exact is seen in an MLP's first forward. Layers that are compiled or checkpointed are left alone.

    Args:
        layers: decoder layers.

    Returns:
        What takes the hooks off again.
    """
    handles = []
    for layer in layers:
        if not hasattr(layer.forward, "_torchdynamo_orig_callable"):
            for mlp in filter(_can_recompute, layer.modules()):
                handles += _Recomputation(layer, mlp).watch()
    return handles


class _Recomputation:
    """Of the input of one MLP's last product.

    Args:
        layer: the decoder layer around it.
        mlp: a module whose forward has one argument, and gives its last product what it computes of the others.
    """

    def __init__(self, layer: nn.Module, mlp: nn.Module) -> None:
        self._layer, self._mlp = layer, mlp
        self._outputs: dict[str, Tensor] = {}
        self._hooks: saved_tensors_hooks | None = None
        self._is_exact: bool | None = None

    def watch(self) -> list[RemovableHandle]:
        """Hooks on its products."""
        last = getattr(self._mlp, LAST)
        return [
            *(m.register_forward_hook(partial(self._note, name)) for name, m in _first_products(self._mlp).items()),
            last.register_forward_pre_hook(self._begin),
            last.register_forward_hook(self._end, always_call=True),
        ]

    def _note(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._outputs[name] = output

    def _begin(self, last: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        outputs, self._outputs = self._outputs, {}
        keeps_input = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in last.parameters())
        if not keeps_input or getattr(self._layer, "gradient_checkpointing", False) or self._is_exact is False:
            return
        make = partial(_input_of_last, self._mlp, outputs)
        if self._is_exact is None:
            self._is_exact = _is_same(make(), inputs[0])
        if self._is_exact and inputs[0].is_contiguous() and inputs[0].storage_offset() == 0:
            self._hooks = saved_tensors_hooks(partial(_pack, _memory_of(inputs[0]), make, last), _unpack)
            self._hooks.__enter__()

    def _end(self, *_: Any) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__()


class _Stub:
    """Of an MLP whose products are known: its forward computes what lies between them."""

    def __init__(self, mlp: nn.Module, outputs: dict[str, Tensor]) -> None:
        self._mlp = mlp
        for name, output in outputs.items():
            setattr(self, name, partial(_given, output))
        setattr(self, LAST, _given_back)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mlp, name)


def _given(output: Tensor, _inputs: Any) -> Tensor:
    return output


def _given_back(inputs: Tensor) -> Tensor:
    return inputs


@torch.no_grad()
def _input_of_last(mlp: nn.Module, outputs: dict[str, Tensor]) -> Tensor:
    forward = getattr(mlp.forward, "__func__", type(mlp).forward)
    return forward(_Stub(mlp, outputs), next(iter(outputs.values())))


def _is_same(made: Tensor, kept: Tensor) -> bool:
    return made.shape == kept.shape and (kept.is_meta or bool(made.equal(kept)))


def _pack(made: tuple[int, int], make: Callable[[], Tensor], last: nn.Module, tensor: Tensor) -> Callable[[], Tensor]:
    """In place of a tensor that the last product saves, what returns it in the backward."""
    if _memory_of(tensor) == made:
        return partial(_view_of, make, tensor.shape, tensor.stride())
    for parameter in last.parameters():  # to which ZeRO-3 gives other memory in the backward
        if _memory_of(tensor) == _memory_of(parameter):
            return partial(_view_of, parameter.detach, tensor.shape, tensor.stride())
    return partial(_given_back, tensor)


def _memory_of(tensor: Tensor) -> tuple[int, int]:
    """Equal for other shapes of it, but not for others in the same memory, as ZeRO's flat weights are.

    On the meta device, too, where there are no addresses.
    """
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _view_of(make: Callable[[], Tensor], shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    return make().as_strided(shape, stride)


def _unpack(packed: Callable[[], Tensor]) -> Tensor:
    return packed()


def _can_recompute(module: nn.Module) -> bool:
    """Whether it has a last product of two others, and its forward has one argument.

    Of a single one before, the halves may be copied, or the function of it kept: its output is then not kept anyway.
    """
    if not isinstance(getattr(module, LAST, None), nn.Module) or len(_first_products(module)) != 2:
        return False
    return len(inspect.signature(module.forward).parameters) == 1


def _first_products(mlp: nn.Module) -> dict[str, nn.Module]:
    """By name, those before the last: all of its modules that have weights."""
    return {n: child for n, child in mlp.named_children() if n != LAST and any(True for _ in child.parameters())}
