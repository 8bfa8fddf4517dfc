"""Model configurations with published dimensions, for measuring and planning without downloading anything."""

from collections.abc import Callable
from functools import partial

from transformers import AutoConfig, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen2Config

from agsel.errors import UserError, one_line

MODEL_SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2.5-0.5b": partial(
        Qwen2Config,
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": partial(
        LlamaConfig,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=True,
    ),
    "llama-3.1-70b": partial(
        LlamaConfig,
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=False,
    ),
    "phi-4-mini": partial(
        Phi3Config,
        vocab_size=200064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        tie_word_embeddings=True,
        bos_token_id=199999,
        eos_token_id=199999,
        pad_token_id=199999,
    ),
    "tiny": partial(
        LlamaConfig,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}
"""Name -> what makes its configuration. `tiny` runs on a CPU."""


def model_config(name: str, flag: str = "--model") -> PreTrainedConfig:
    """The configuration of a built-in shape, a model folder or a hub model.

    Raises:
        UserError: there is none; the message names the flag.
    """
    if name in MODEL_SHAPES:
        return MODEL_SHAPES[name]()
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"no model {name!r} ({flag}): neither {', '.join(MODEL_SHAPES)} nor a folder here, and from the hub: "
            f"{one_line(error)}"
        ) from error
