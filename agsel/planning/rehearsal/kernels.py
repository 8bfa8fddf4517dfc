"""GPU kernels by the memory they use: fused attention, and fused losses, which never hold the logits of all tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from agsel.planning.rehearsal.ledger import Ledger
from agsel.planning.rehearsal.liger_layers import liger_layers, replaced
from agsel.planning.rehearsal.workload import Loss, Workload

aten = torch.ops.aten

TRL_TOKENS, TRL_VOCABULARY = 4096, 32768
"""Tile of TRL's fused loss (`TOKEN_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""


@contextmanager
def gpu_kernels(model: PreTrainedModel, workload: Workload, ledger: Ledger) -> Iterator[None]:
    """Use the memory of what a GPU would run: fused attention, at stage 3 DeepSpeed's own linear layer, Liger."""
    with ExitStack() as stack:
        stack.enter_context(replaced(functional, scaled_dot_product_attention=_attention))
        if workload.zero.stage == 3:
            stack.enter_context(replaced(functional, linear=PartitionedLinear.apply))
        if workload.liger_layers:
            stack.enter_context(liger_layers(model, ledger))
        yield


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What `scaled_dot_product_attention` calls on a GPU: the flash kernel if it can, else the memory-efficient one.

    cuDNN's kernel, which newer PyTorch may prefer, keeps the same tensors for the backward.
    """
    if attn_mask is None and query.shape[-1] == value.shape[-1]:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


class PartitionedLinear(torch.autograd.Function):
    """DeepSpeed's linear layer at stage 3: it keeps its input even where its weight is frozen."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Of inputs [..., features], weight [outputs, features] and bias [outputs]."""
        ctx.save_for_backward(inputs, weight)
        outputs = inputs.matmul(weight.t())
        return outputs if bias is None else outputs.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Of those that need one."""
        inputs, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        needs_input, needs_weight, needs_bias = [*ctx.needs_input_grad, False][:3]
        return (
            gradient.matmul(weight) if needs_input else None,
            rows.t().matmul(inputs.reshape(-1, inputs.shape[-1])) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )[: len(ctx.needs_input_grad)]


@contextmanager
def loss_kernels(model: Any, loss: Loss, ledger: Ledger) -> Iterator[None]:
    """Count what head and loss allocate as such; with a fused loss, the model returns the loss in place of logits."""
    head = model.get_output_embeddings()

    def on_entry(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        ledger.kind = "loss"
        if arguments[0].requires_grad:
            arguments[0].register_hook(on_exit)

    def on_exit(_: torch.Tensor) -> None:
        ledger.kind = "activations"

    handle = head.register_forward_pre_hook(on_entry)
    if loss != "transformers":
        fused = {"liger": LigerLoss, "trl": TrlLoss}[loss]
        head.forward = lambda hidden: fused.apply(hidden, head.weight)
    try:
        yield
    finally:
        ledger.kind = "activations"
        handle.remove()
        head.__dict__.pop("forward", None)


class LigerLoss(torch.autograd.Function):
    """Liger's fused linear cross-entropy (0.8.5): the gradients are made in the forward, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Of hidden states [..., hidden size] and the head's weight [vocabulary, hidden size]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        wanted = math.ceil(len(rows) / math.ceil(weight.shape[0] / weight.shape[1]))
        chunk = min(len(rows), 2 ** math.ceil(math.log2(wanted)))
        gradient = torch.empty_like(rows)
        weight_gradient = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        logits = rows.new_empty(chunk, weight.shape[0])
        for own, own_gradient in zip(rows.split(chunk), gradient.split(chunk), strict=True):
            tile = logits[: len(own)]
            torch.mm(own, weight.t(), out=tile).exp_()  # one more pass over the logits makes their gradient
            torch.mm(tile, weight, out=own_gradient)
            if weight_gradient is not None:
                torch.addmm(weight_gradient, tile.t(), own, out=weight_gradient)
        ctx.save_for_backward(gradient.view(hidden.shape), weight_gradient)
        return rows.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        """The gradients that the forward made."""
        return ctx.saved_tensors


class TrlLoss(torch.autograd.Function):
    """TRL's fused head (1.16): tiles of logits in the forward and again in the backward, with gradients in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Of hidden states [..., hidden size] and the head's weight [vocabulary, hidden size]."""
        rows = hidden.reshape(-1, hidden.shape[-1]).clone()  # it picks the rows with a label
        for own, part, tile in _tiles(rows, weight):
            torch.mm(own, part.t(), out=tile)
        ctx.save_for_backward(rows, weight)
        ctx.shape = hidden.shape
        return rows.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        """Of the hidden states, and of the weight if it is trained."""
        rows, weight = ctx.saved_tensors
        gradient = torch.empty_like(rows, dtype=torch.float32)
        weight_gradient = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        products = 2 if weight_gradient is None else 3  # logits again, gradient of the rows, gradient of the weight
        for own, part, tile in _tiles(rows, weight):
            for _number in range(products):
                torch.mm(own, part.t(), out=tile)
        of_weight = None if weight_gradient is None else weight_gradient.to(weight.dtype)
        return gradient.to(rows.dtype).view(ctx.shape), of_weight


def _tiles(rows: torch.Tensor, weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Pieces of the rows and of the vocabulary, with one buffer for the logits of each pair."""
    buffer = rows.new_empty(min(len(rows), TRL_TOKENS), TRL_VOCABULARY)
    for own in rows.split(TRL_TOKENS):
        for part in weight.split(TRL_VOCABULARY):
            yield own, part, buffer[: len(own), : len(part)]
