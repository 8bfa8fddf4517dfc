"""Counting the bytes of live tensors on the meta device, where they have none."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from agsel.planning.rehearsal.trace import Phase, Trace

aten = torch.ops.aten

GRANULE = 512
"""Bytes; PyTorch's CUDA allocator rounds up to it."""
MATRIX_PRODUCTS = {packet: flop_registry[packet] for packet in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)}
WITHOUT_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach}
"""Beside views."""

Kind = Literal["weights", "states", "gradients", "buffers", "activations", "loss"]


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that come to life inside and still live, and remembers the most.

    Args:
        answer: to questions about values, which are not there, such as whether all tokens are attended to.

    Attributes:
        live: bytes by kind now.
        peak: bytes by kind at the fullest moment.
        flops: of the matrix products seen, without those inside attention kernels.
        kind: of what is allocated now.
        trace: what is computed, by phase.
        phase: of the step now.
    """

    def __init__(self, answer: bool = True) -> None:
        super().__init__()
        self._answer = answer
        self.kind: Kind = "activations"
        self.phase: Phase = "forward"
        self._fusing = False
        self.clear()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let compiled layers run inside."""
        return True

    def clear(self) -> None:
        """Forget everything."""
        self.peak: Counter[str] = Counter()
        self.flops = 0
        self.trace = Trace()
        self.live: Counter[str] = Counter()
        self._entries: dict[int, tuple[Kind, int]] = {}

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Never count the memory of these tensors."""
        self._entries |= {tensor.untyped_storage()._cdata: (self.kind, 0) for tensor in tensors}

    @contextmanager
    def counting(self, kind: Kind) -> Iterator[None]:
        """Count what is allocated inside as being of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    @contextmanager
    def fusing(self) -> Iterator[None]:
        """Count only what matrix products and attention kernels read and write, as between fused pointwise kernels."""
        self._fusing = True
        try:
            yield
        finally:
            self._fusing = False

    def allocate(self, kind: Kind, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor that counts as of this kind while it lives."""
        with self.counting(kind):
            return torch.empty(elements, dtype=dtype, device="meta")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return self._answer
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = MATRIX_PRODUCTS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        self._note_kernel(func, args, kwargs, result)
        if not self._fusing:
            self.enter(result)
        elif count is not None or "attention" in func.__name__:
            self.enter((args, kwargs, result))
        return result

    def touch(self, tree: Any, flops: int = 0) -> None:
        """Note a kernel that reads or writes the tensors in a structure."""
        tensors = [tensor for tensor in tree_leaves(tree) if isinstance(tensor, torch.Tensor)]
        self.trace.compute(self.phase, flops, sum(tensor.nbytes for tensor in tensors))

    def _note_kernel(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.is_view or func._overloadpacket in WITHOUT_KERNEL:
            return
        written = (args, kwargs, None if "out" in kwargs else result)
        if "attention" in func.__name__:
            self.touch(written, attention_flops(func.__name__, args))
            return
        count = flop_registry.get(func._overloadpacket)
        if count is not None or not self._fusing:  # else it is part of another kernel
            self.touch(written, count(*args, **kwargs, out_val=result) if count else 0)

    def enter(self, tree: Any) -> None:
        """Count the memory of the tensors in a structure from now on, if it is not counted yet."""
        for tensor in (tree,) if isinstance(tree, torch.Tensor) else tree_leaves(tree):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor.untyped_storage())

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._entries or not storage.nbytes():
            return
        nbytes = math.ceil(storage.nbytes() / GRANULE) * GRANULE
        self._entries[key] = self.kind, nbytes
        self.live[self.kind] += nbytes
        weakref.finalize(storage, self._leave, key)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _leave(self, key: int) -> None:
        kind, nbytes = self._entries.pop(key, (self.kind, 0))
        self.live[kind] -= nbytes


def attention_flops(kernel: str, arguments: Sequence[Any]) -> int:
    """Of scaled dot-product attention: 2 matrix products forward, 5 backward, where the scores are made again.

    PyTorch's own count refuses keys and values with fewer heads than the queries before torch 2.13.

    Args:
        kernel: name of the operator.
        arguments: of it: queries, keys and values, backward after the gradient of the output.
    """
    is_backward = "backward" in kernel
    queries, keys = arguments[1:3] if is_backward else arguments[:2]
    flops = (5 if is_backward else 2) * 2 * queries.numel() * keys.shape[-2]
    causal = "flash_attention" in kernel and any(argument is True for argument in arguments)
    return flops // 2 if causal else flops
