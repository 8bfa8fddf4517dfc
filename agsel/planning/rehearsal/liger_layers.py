"""Liger's kernels inside the layers by the memory they use: its own code, or where it is not installed, as described.

The description allocates and keeps what Liger 0.8.5 does, so that a laptop plans the run of a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from agsel.errors import UserError
from agsel.planning.rehearsal.ledger import Ledger

DESCRIBED = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Types of models whose description the tests compare with Liger's own code."""


def is_liger_installed() -> bool:
    """Whether Liger's own code can be rehearsed; it needs Triton, which there is for GPUs only."""
    return all(importlib.util.find_spec(package) for package in ("liger_kernel", "triton"))


@contextmanager
def liger_layers(model: Any, ledger: Ledger) -> Iterator[None]:
    """Let a model compute with Liger's kernels, none of which is launched.

    Raises:
        UserError: Liger is not installed, and its kernels for this type of model are not described.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with own_code(model, base, ledger) if is_liger_installed() else described(base, ledger):
        yield


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes for a while."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def own_code(model: Any, base: Any, ledger: Ledger) -> Iterator[None]:
    """Liger's, with all its allocations."""
    from transformers.integrations.liger import apply_liger_kernel

    def launch_nothing(*arguments: Any, **_: Any) -> None:
        ledger.touch(arguments)

    kernels = importlib.import_module("triton.runtime.jit").KernelInterface
    functions = vars(sys.modules[type(base).__module__])  # Liger replaces some for the whole process
    before = dict(functions)
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    try:
        with replaced(kernels, __getitem__=lambda kernel, grid: launch_nothing):
            yield
    finally:
        functions.update(before)


@contextmanager
def described(base: Any, ledger: Ledger) -> Iterator[None]:
    """As `own_code` does, by the functions below."""
    if base.config.model_type not in DESCRIBED:
        raise UserError(
            f"Liger's kernels for {base.config.model_type} are not described here: install what they need, pip install "
            "'agsel[liger]' triton, or plan without them (--loss liger instead of --liger)"
        )
    forwards = {"RMSNorm": _norm, "MLP": _mlp}
    with ExitStack() as stack:
        stack.enter_context(replaced(sys.modules[type(base).__module__], apply_rotary_pos_emb=partial(_rope, ledger)))
        for module in base.modules():
            for ending, forward in forwards.items():
                if type(module).__name__.endswith(ending):
                    stack.enter_context(replaced(module, forward=partial(forward, ledger, module)))
        yield


def _norm(ledger: Ledger, module: Any, hidden: torch.Tensor) -> Any:
    return RmsNorm.apply(ledger, hidden, module.weight)


def _mlp(ledger: Ledger, module: Any, hidden: torch.Tensor) -> Any:
    if hasattr(module, "gate_up_proj"):
        gate, up = module.gate_up_proj(hidden).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(hidden), module.up_proj(hidden)
    return module.down_proj(SwiGlu.apply(ledger, gate, up))


def _rope(ledger: Ledger, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    return Rope.apply(ledger, query, key, cos, sin)


class RmsNorm(torch.autograd.Function):
    """Keeps its input and an fp32 number per row; the input's gradient takes the place of the output's."""

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Of hidden states [..., features] and weight [features]."""
        rows = hidden.contiguous().view(-1, hidden.shape[-1])
        outputs = torch.empty_like(rows)
        deviations = rows.new_empty(len(rows), dtype=torch.float32)
        ledger.touch((outputs, rows, weight, deviations))
        ctx.ledger = ledger
        ctx.save_for_backward(rows, weight, deviations)
        return outputs.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The weight's in fp32 first, if it is trained."""
        rows, weight, deviations = ctx.saved_tensors
        gradient = gradient.contiguous()
        partial_sums = weight.new_empty(1, len(weight), dtype=torch.float32) if ctx.needs_input_grad[2] else None
        ctx.ledger.touch((gradient, gradient, rows, weight, deviations, partial_sums))
        of_weight = None if partial_sums is None else partial_sums.sum(dim=0).to(weight.dtype)
        return None, gradient, of_weight


class SwiGlu(torch.autograd.Function):
    """Keeps its two inputs, whose gradients take their place."""

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Of gate and up [..., features]."""
        gate, up = gate.contiguous(), up.contiguous()
        outputs = torch.empty_like(gate)
        ledger.touch((gate, up, outputs))
        ctx.ledger = ledger
        ctx.save_for_backward(gate, up)
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """In place of what was kept."""
        gate, up = ctx.saved_tensors
        ctx.ledger.touch((gradient.contiguous(), gate, up))
        return None, gate, up


class Rope(torch.autograd.Function):
    """Turns queries and keys where they are, and their gradients, too."""

    @staticmethod
    def forward(
        ctx: Any, ledger: Ledger, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> Any:
        """Of query and key [rows, heads, tokens, features], cos and sin [rows, tokens, features]."""
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.ledger = ledger
        ctx.save_for_backward(cos, sin)
        return _turned(ledger, query, key, cos, sin)

    @staticmethod
    def backward(ctx: Any, of_query: torch.Tensor, of_key: torch.Tensor) -> Any:
        """The other way round."""
        return None, *_turned(ctx.ledger, of_query, of_key, *ctx.saved_tensors), None, None


def _turned(ledger: Ledger, query: torch.Tensor, key: torch.Tensor, *angles: torch.Tensor) -> Any:
    """In memory, heads come after tokens."""
    query, key = query.transpose(1, 2).contiguous(), key.transpose(1, 2).contiguous()
    ledger.touch((query, key, *angles))
    return query.transpose(1, 2), key.transpose(1, 2)
