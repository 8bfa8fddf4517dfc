"""The widest activation of a trained layer is made again in the backward, instead of being kept from the forward on.

The last product of an MLP keeps its input for the gradient of its weight: the elementwise product of what the products
before it have given, which are kept anyway. It is made again by the MLP's own code, in one elementwise kernel.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

LAST = "down_proj"
"""As transformers names an MLP's last product."""
PRODUCTS_BEFORE = 2


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
        self._outputs: dict[str, _Output] = {}
        self._hooks: saved_tensors_hooks | None = None
        self._is_exact: dict[bool, bool] = {}  # in training and in evaluation, between which dropout differs

    def watch(self) -> list[RemovableHandle]:
        """Hooks on its products."""
        last = getattr(self._mlp, LAST)
        return [
            *(m.register_forward_hook(partial(self._note, name)) for name, m in _first_products(self._mlp).items()),
            last.register_forward_pre_hook(self._begin),
            last.register_forward_hook(self._end, always_call=True),
        ]

    def _note(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and isinstance(output, Tensor) and output.requires_grad:
            self._outputs[name] = _Output(output)

    def _begin(self, last: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._end()  # what a forward has left that was interrupted
        outputs, self._outputs = self._outputs, {}
        if len(outputs) < PRODUCTS_BEFORE or not self._keeps_input(last, inputs) or _has_saved_tensors_hooks():
            return
        make = partial(_input_of_last, self._mlp, outputs)
        if self._can_make(make, inputs[0]):
            self._hooks = saved_tensors_hooks(partial(_pack, weakref.ref(inputs[0]), make, last), _unpack)
            self._hooks.__enter__()

    def _keeps_input(self, last: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
        if not torch.is_grad_enabled() or getattr(self._layer, "gradient_checkpointing", False):
            return False
        trains = any(parameter.requires_grad for parameter in last.parameters())
        return trains and len(inputs) == 1 and inputs[0].is_contiguous()

    def _can_make(self, make: Callable[[], Tensor], kept: Tensor) -> bool:
        is_training = self._mlp.training
        if is_training not in self._is_exact:
            is_same = _is_same(make, kept)
            if is_same is None:
                return False
            self._is_exact[is_training] = is_same
        return self._is_exact[is_training]

    def _end(self, *_: Any) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None and _innermost_hooks() == (hooks.pack_hook, hooks.unpack_hook):
            hooks.__exit__()


class _Output:
    """Of a product, for which it stands as long as nobody has changed it in place."""

    def __init__(self, output: Tensor) -> None:
        self._output, self._version = output, output._version

    def __call__(self, _inputs: Tensor | None = None) -> Tensor:
        if self._output._version != self._version:
            raise RuntimeError("what an MLP's product has given was changed in place, and is needed in the backward")
        return self._output


class _Stub:
    """Of an MLP whose products are known: its forward computes what lies between them."""

    def __init__(self, mlp: nn.Module, outputs: dict[str, _Output]) -> None:
        self._mlp = mlp
        vars(self).update(outputs)
        setattr(self, LAST, _given_back)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mlp, name)


def _given_back(inputs: Tensor) -> Tensor:
    return inputs


@torch.no_grad()
def _input_of_last(mlp: nn.Module, outputs: dict[str, _Output]) -> Tensor:
    forward = getattr(mlp.forward, "__func__", type(mlp).forward)
    any_output = next(iter(outputs.values()))
    with torch._C._DisableAutocast():  # as in the backward
        return forward(_Stub(mlp, outputs), any_output()).contiguous()


def _is_same(make: Callable[[], Tensor], kept: Tensor) -> bool | None:
    """None if these numbers do not tell: of zeros anything may be zero, and no number equals itself if it is none."""
    try:
        made = make()
    except Exception:  # of a forward that does more than we know
        return False
    if made.shape != kept.shape or made.dtype != kept.dtype:
        return False
    if kept.is_meta:
        return True
    if not kept.any() or kept.isnan().any():
        return None
    return bool(made.equal(kept))


def _has_saved_tensors_hooks() -> bool:
    """Of somebody else, who offloads what is saved, or makes it again; or whether such hooks are forbidden."""
    state: Any = torch._C._autograd
    return not state._saved_tensors_hooks_is_enabled() or _innermost_hooks() is not None


def _innermost_hooks() -> tuple[Any, Any] | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _pack(
    kept: weakref.ref[Tensor], make: Callable[[], Tensor], last: nn.Module, tensor: Tensor
) -> Callable[[], Tensor]:
    """In place of a tensor that the last product saves, what returns it in the backward."""
    place, inputs = _place_of(tensor), kept()
    if inputs is not None and place == _place_of(inputs):
        return partial(_view_of, make, tensor.shape, tensor.stride())
    for parameter in last.parameters():  # to which ZeRO-3 gives other memory in the backward
        if place == _place_of(parameter):
            return partial(_view_of, parameter.detach, tensor.shape, tensor.stride())
    return partial(_given_back, tensor)


def _place_of(tensor: Tensor) -> tuple[int, int]:
    """Memory and where in it, as the weights of a block share one; on the meta device, too, that has no addresses."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _view_of(make: Callable[[], Tensor], shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    return make().as_strided(shape, stride)


def _unpack(packed: Callable[[], Tensor]) -> Tensor:
    return packed()


def _can_recompute(module: nn.Module) -> bool:
    """Whether it has a last product of two others, and its forward has one argument.

    Of a single one before, the halves may be copied, or the function of it kept: its output is then not kept anyway.
    """
    if not isinstance(getattr(module, LAST, None), nn.Module) or len(_first_products(module)) != PRODUCTS_BEFORE:
        return False
    return len(inspect.signature(module.forward).parameters) == 1


def _first_products(mlp: nn.Module) -> dict[str, nn.Module]:
    """By name, those before the last: all of its modules that have weights."""
    return {n: child for n, child in mlp.named_children() if n != LAST and any(True for _ in child.parameters())}
