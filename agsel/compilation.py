"""Compile the decoder layers one by one, so that freezing and thawing blocks does not compile anything again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from agsel.blocks import decoder_layers

GRAPHS_PER_LAYER_CODE = 64
"""Four graphs per kind of input shape; torch's own limit of 8 would silently go back to eager mode."""


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile the forward of each decoder layer. Call it before `deepspeed.initialize`, at stage 1 or 2.

    All layers share their graphs, and there are four: a layer is frozen or trainable, and its input needs a gradient or
    not. After these have been seen nothing is compiled again, whatever blocks are selected. A second sequence length
    makes four more graphs, for any length.

    Args:
        model: a decoder model.
        options: passed on to `torch.compile`.

    Raises:
        UserError: no decoder layers are found.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_PER_LAYER_CODE)
    for layer in decoder_layers(model):
        # Not `layer.compile`, which compiles the calls of hooks too.
        layer.forward = torch.compile(layer.forward, **options)
