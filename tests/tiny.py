"""A tiny decoder model and batches for tests; the same in every process for the same arguments."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61
LENGTH = 12


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


def tiny_batch(step: int, micro_step: int, rank: int, rows: int = 2) -> torch.Tensor:
    """int64 [rows, LENGTH] token ids of one micro-batch of one rank."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * micro_step + rank + 1)
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
