"""Every decoder of the installed transformers falls into the right blocks.

On the meta device weights cost nothing, so the sizes stay as they are: only the layers are made few.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from agsel.blocks import find_blocks
from agsel.errors import UserError

LAYERS = 4
NUMBERS_OF_LAYERS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer", "decoder_layers", "num_decoder_layers"}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
CHANGED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "gpt_neo": {"attention_types": [[["global"], LAYERS]]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"] * 2},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}
"""What the default configuration of an architecture leaves out, or what belongs to a number of layers."""

VISION = {
    "fuyu": r"model\.vision_embed_tokens\.",
    "gemma3": r"model\.(vision_tower|multi_modal_projector)\.",
    "git": r"git\.(image_encoder|visual_projection)\.",
    "got_ocr2": r"model\.(vision_tower|multi_modal_projector)\.",
}
"""What these have beside a language model is to be frozen."""

NOT_BUILT = {
    "gemma3n": "its vision tower is one of timm, which is not installed; gemma3n_text is the same language model",
    "musicgen": "the configuration is that of an encoder-decoder, the decoder writes audio",
    "musicgen_melody": "as musicgen",
}
REFUSED = {
    "blt": ("a stack of layers for bytes before those for patches, and one after", "parameters in no block"),
    "gemma4_assistant": ("drafts for another model, whose states it projects first", "parameters in no block"),
    "gemma4_unified_assistant": ("as gemma4_assistant", "parameters in no block"),
    "hrm_text": ("two stacks that take turns", "has 2 stacks of 4 layers"),
    "xlm": ("no list of layers: attention, norms and feed-forwards are lists each", "has 4 stacks of 4 layers"),
}
BUILT = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_BUILT | REFUSED]

BEFORE = {
    *("embeddings", "embedding", "embed_tokens", "embed_in", "tokens_embed", "wte", "word_embeddings", "w"),
    *("word_embedding", "mask_emb", "input_embedding", "segment_embedding", "embed_tokens_per_layer"),
    *(
        "wpe",
        "embed_positions",
        "position_embeddings",
        "positions_embed",
        "position_bias",
        "ngram_embeddings",
        "embed_tokens_extend",
    ),
    *("embed_norm", "embeddings_layer_norm", "word_embeddings_layernorm", "layernorm_embedding", "embeddings_project"),
    *("per_layer_model_projection", "per_layer_projection_norm", "embedding_hidden_mapping_in", "altup_projections"),
    *("input_hidden_states_scale", "input_hidden_states_bias"),
}
NORMS_AFTER = {
    *("norm", "norm_f", "layer_norm", "layernorm", "LayerNorm", "ln", "ln_f", "ln_out", "out_norm", "final_norm"),
    *("final_layer_norm", "final_layernorm", "output_layernorm", "embedding_norm", "hc_norm"),
}
AFTER = {
    *("lm_head", "head", "lm_loss", "cls", "pooler", "generator_predictions", "altup_unembed_projections"),
    *("hc_head", "hyper_connection_mixer"),
}
NAMED_OTHERWISE = {("bigbird_pegasus", "layernorm_embedding"): "final_norm"}


def configuration(name: str) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[name]
    changed = CHANGED.get(name, {})
    config = kind(**few_layers(kind), **changed)
    text = config.get_text_config()
    if text is config:
        return config
    place = next(place for place in kind.sub_configs if getattr(config, place) is text)
    return kind(**changed | {place: few_layers(type(text)) | changed.get(place, {})})


def few_layers(kind: type[PreTrainedConfig]) -> dict[str, int]:
    return dict.fromkeys(NUMBERS_OF_LAYERS & kind.__dataclass_fields__.keys(), LAYERS)


def built(name: str) -> nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(name))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(not re.match(VISION.get(name, "^$"), parameter_name))
    return model


def expected_block(architecture: str, name: str) -> str:
    """Of a parameter that is in no layer, by the names that the architectures gave to what they have around these."""
    words = name.split(".")
    for (where, word), block in NAMED_OTHERWISE.items():
        if where == architecture and word in words:
            return block
    for block, known in {"embed": BEFORE, "final_norm": NORMS_AFTER, "head": AFTER}.items():
        if known & {*words}:
            return block
    raise AssertionError(f"{architecture} has something new around its layers: {name}")


def blocks_by_name(model: nn.Module) -> dict[str, str]:
    """Block of each trainable parameter, by the parameter's name."""
    blocks = find_blocks(model)
    block_of = {id(parameter): block.name for block in blocks for parameter in block.parameters}
    assert sum(len(block.parameters) for block in blocks) == len(block_of), "a parameter is in two blocks"
    return {name: block_of[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def told_blocks(model: Any) -> dict[int, str]:
    """Of the embedding, tied or not, and of the head, which every architecture tells."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    told = {id(parameter): "head" for parameter in head.parameters()} if head is not None else {}
    return told | {id(parameter): "embed" for parameter in embedding.parameters()}


@pytest.mark.parametrize("name", BUILT)
def test_each_parameter_is_in_the_block_that_its_place_tells(name: str) -> None:
    model = built(name)
    found, told = blocks_by_name(model), told_blocks(model)
    assert {block for block in found.values() if block.startswith("layers.")} == {f"layers.{i}" for i in range(LAYERS)}
    for parameter_name, parameter in model.named_parameters():
        block = found.get(parameter_name)
        if block is not None and block.startswith("layers."):
            assert block.replace("layers", "") + "." in parameter_name
        elif block is not None:
            wanted = told.get(id(parameter)) or expected_block(name, parameter_name)
            assert (parameter_name, block) == (parameter_name, wanted)


@pytest.mark.parametrize("name", VISION)
def test_what_sees_is_in_no_block(name: str) -> None:
    model = built(name).requires_grad_(True)
    with pytest.raises(UserError, match=f"^parameters in no block: .*{VISION[name]}"):
        find_blocks(model)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_decoder_with_one_stack_of_layers_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=REFUSED[name][1]):
        find_blocks(built(name))


def test_the_exceptions_exist() -> None:
    assert {*CHANGED, *VISION, *NOT_BUILT, *REFUSED} <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
