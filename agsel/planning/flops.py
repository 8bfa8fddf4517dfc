"""Arithmetic of training, as speeds of different methods are compared by it."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def flops_per_token(model: nn.Module, sequence: int) -> float:
    """Arithmetic of forward and backward with every weight trained, without recomputation.

    6 per weight of a matrix product (a tied head counts), and 6 * layers * heads * head size * sequence for attention:
    two products of 2 * heads * head size * sequence each, forward and twice that backward, causal half. LoRA's own
    matrices are left out, so that all methods are measured against the same arithmetic.
    """
    config: Any = model.config
    modules = [module for name, module in model.named_modules() if "lora_" not in name]
    weights = sum(module.in_features * module.out_features for module in modules if isinstance(module, nn.Linear))
    weights += sum(module.nx * module.nf for module in modules if isinstance(module, Conv1D))
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 6.0 * (weights + config.num_hidden_layers * config.num_attention_heads * head_size * sequence)
