"""A tiny decoder model and batches for tests; the same in every process for the same arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import agsel
from agsel.blocks import decoder_layers
from agsel.elements import ElementMask

VOCABULARY = 61
LENGTH = 12
WITHOUT_ELEMENTS = ("1.", "v_proj")
"""Names of what has none in `element_model`: all of layer 1, and a matrix of the others."""


def tiny_model(
    *, layers: int = 4, intermediate: int = 36, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A Llama with odd sizes, so that partitions need padding."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=28,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype)


def adapted_model(*, dropout: float = 0.0, dora: bool = False) -> PeftModel:
    """The tiny model with LoRA or DoRA adapters that add something from the start."""
    adapters = LoraConfig(
        r=3,
        lora_alpha=2,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        use_dora=dora,
    )
    model = tiny_model()
    torch.manual_seed(1)
    return get_peft_model(model, adapters)


def random_mask(model: nn.Module, density: float, without: Sequence[str] = ()) -> ElementMask:
    """About `density` of the linear weights in the layers, but none of those with a name that contains one of these."""
    generator = torch.Generator().manual_seed(7)
    linear = {f"{name}.weight": m.weight for name, m in decoder_layers(model).named_modules() if type(m) is nn.Linear}
    prefix = next(name for name, module in model.named_modules() if module is decoder_layers(model))
    chosen = {
        f"{prefix}.{name}": weight for name, weight in linear.items() if not any(part in name for part in without)
    }
    places = {name: torch.rand(weight.numel(), generator=generator) < density for name, weight in chosen.items()}
    indices = {name: place.nonzero().view(-1).int() for name, place in places.items() if place.any()}
    return ElementMask(indices, {name: tuple(chosen[name].shape) for name in indices})


def element_model(density: float = 0.1, *, intermediate: int = 36) -> LlamaForCausalLM:
    """The tiny model of which some elements are trained, none of layer 1 and of the value projections."""
    model = tiny_model(intermediate=intermediate)
    agsel.use_elements(model, random_mask(model, density, WITHOUT_ELEMENTS))
    return model


def tiny_batch(step: int, micro_step: int, rank: int, rows: int = 2) -> torch.Tensor:
    """int64 [rows, LENGTH] token ids of one micro-batch of one rank."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * micro_step + rank + 1)
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
