"""Every parameter of every family of decoders falls in the right block; the param groups are those blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from agsel.blocks import block_param_groups, find_blocks
from agsel.errors import UserError
from agsel.zero.parameters import global_numel

LAYERS = 3
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "biogpt": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4, "num_attention_heads": 4},
    "cohere": {},
    "falcon": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"num_layers": LAYERS, "attention_types": [[["global"], LAYERS]]},
    "gpt_neox": {},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "jamba": {"attn_layer_offset": 0, "attn_layer_period": 2, "mamba_d_state": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama": {},
    "mamba": {},
    "mistral": {},
    "mixtral": {},
    "mpt": {},
    "olmo": {},
    "olmo2": {},
    "opt": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 8},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": EXPERTS,
    "recurrent_gemma": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {"d_model": 16, "ffn_dim": 24, "num_layers": LAYERS, "attention_heads": 2},
}
TIED_OR_NOT = [(family, tied) for family in FAMILIES for tied in (False, True)]
NAMES_OF_LAYERS = [f"layers.{index}" for index in range(LAYERS)]


def tiny_decoder(family: str, **changed: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | changed))
    return AutoModelForCausalLM.from_config(config).eval()


def members(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters by block."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {block.name: [names[id(parameter)] for parameter in block.parameters] for block in find_blocks(model)}


def names_of_groups(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{names[id(parameter)] for parameter in group["params"]} for group in groups]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def expected_blocks(model: Any) -> dict[str, str]:
    """Block by parameter name, told by the order in which a forward pass meets the modules, not by agsel.

    In a layer if its name has `.layers.<i>.` or `.h.<i>.`; else in the embedding, if it is used before the layers, or
    in the head, if that is where the logits come from, or in the final norm.
    """
    met: dict[str, str] = {}
    head = model.get_output_embeddings()
    phase = ["embed"]

    def meet(module: nn.Module, _: Any) -> None:
        if any(module is layer for layer in layers):
            phase[0] = "final_norm"
        for name, parameter in model.named_parameters():
            if any(parameter is own for own in module.parameters(recurse=False)):
                layer = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
                after = "head" if module is head else phase[0]
                met.setdefault(name, f"layers.{layer[1]}" if layer else after)

    layers = [module for name, module in model.named_modules() if re.search(r"\.(layers|h|blocks)\.\d+$", name)]
    hooks = [module.register_forward_pre_hook(meet) for module in model.modules()]
    model(torch.arange(8)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return met


@pytest.mark.parametrize(("family", "tied"), TIED_OR_NOT)
def test_each_parameter_is_in_the_block_that_uses_it(family: str, tied: bool) -> None:
    model = tiny_decoder(family, tie_word_embeddings=tied)
    expected = expected_blocks(model)
    found = members(model)
    block_of = {name: block for block, names in found.items() for name in names}
    assert sorted(block_of) == sorted(name for names in found.values() for name in names), "a parameter in two blocks"
    assert sorted(block_of) == sorted(name for name, _ in model.named_parameters()), "a parameter in no block"
    assert {name: block_of[name] for name in expected} == expected
    assert list(found) == [
        name for name in ("embed", *NAMES_OF_LAYERS, "final_norm", "head") if name in {*expected.values()}
    ]


@pytest.mark.parametrize(("family", "tied"), TIED_OR_NOT)
def test_the_forward_meets_the_parameters(family: str, tied: bool) -> None:
    """The test above compares something: only kernels inside layers go unmet, and a tied head is the embedding."""
    model = tiny_decoder(family, tie_word_embeddings=tied)
    expected = expected_blocks(model)
    unmet = {name for name, _ in model.named_parameters()} - expected.keys()
    assert all(re.search(r"\.(conv1d|dt_proj|conv\.conv)\.", name) for name in unmet), unmet
    assert {"embed", *NAMES_OF_LAYERS} <= {*expected.values()}
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_projections_around_the_layers_go_with_the_embedding_and_the_head() -> None:
    """As in OPT-350m, whose embedding is narrower than its layers."""
    found = members(tiny_decoder("opt", word_embed_proj_dim=8, do_layer_norm_before=False))
    assert list(found) == ["embed", *NAMES_OF_LAYERS, "head"]
    before_the_layers = ("embed_tokens", "embed_positions", "project_in")
    assert {*found["embed"]} == {f"model.decoder.{name}.weight" for name in before_the_layers}
    assert found["head"] == ["model.decoder.project_out.weight"]


def test_the_inputs_of_every_layer_go_with_the_embedding() -> None:
    """Gemma 4 embeds once more for every layer. It registers those parameters after the layers."""
    found = members(tiny_decoder("gemma4_text", vocab_size_per_layer_input=32, hidden_size_per_layer_input=4))
    assert list(found) == ["embed", *NAMES_OF_LAYERS, "final_norm"]
    embeddings = ("embed_tokens", "embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")
    assert {*found["embed"]} == {f"model.{name}.weight" for name in embeddings}


def test_a_base_model_without_head() -> None:
    assert list(members(tiny_decoder("llama").model)) == ["embed", *NAMES_OF_LAYERS, "final_norm"]


def test_is_layer_tells_layers_from_the_rest() -> None:
    layers = [block.name for block in find_blocks(tiny_decoder("llama")) if block.is_layer]
    assert layers == NAMES_OF_LAYERS


def test_trainable_follows_requires_grad() -> None:
    block = find_blocks(tiny_decoder("llama"))[1]
    first, *rest = block.parameters
    first.requires_grad_(False)
    assert [id(parameter) for parameter in block.trainable] == [id(parameter) for parameter in rest]


def test_more_than_ten_layers_stay_in_order() -> None:
    assert list(members(tiny_decoder("llama", num_hidden_layers=12)))[1:-2] == [f"layers.{i}" for i in range(12)]


class PlainDecoder(nn.Module):
    """No Hugging Face: learned positions, layers with more experts than there are layers, final norm, head."""

    def __init__(self, layers: int = LAYERS, experts: int = 5) -> None:
        super().__init__()
        self.token = nn.Embedding(32, 8)
        self.positions = nn.Parameter(torch.zeros(16, 8))
        self.stack = nn.ModuleList(PlainLayer(experts) for _ in range(layers))
        self.last = nn.LayerNorm(8)
        self.output = nn.Linear(8, 32)


class PlainLayer(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))


def test_a_plain_module() -> None:
    found = members(PlainDecoder())
    assert list(found) == ["embed", *NAMES_OF_LAYERS, "final_norm", "head"]
    assert {*found["embed"]} == {"token.weight", "positions"}
    assert {*found["layers.1"]} == {f"stack.1.{name}" for name, _ in PlainLayer(5).named_parameters()}
    assert found["final_norm"] == ["last.weight", "last.bias"]
    assert found["head"] == ["output.weight", "output.bias"]


class Unordered(PlainDecoder):
    """Registers what comes after the layers before them, gives it names that mislead, and counts the layers early."""

    def __init__(self) -> None:
        super().__init__()
        del self.last, self.output
        stack = self._modules.pop("stack")
        self.embedding_norm = nn.LayerNorm(8)
        self.output = nn.Linear(8, 32)
        self.stack = stack
        self.norm_of_embedding = nn.LayerNorm(8)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm_of_embedding(self.token(tokens) + self.positions)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        depth = len(self.stack)
        hidden = self.embed(tokens) / depth
        hidden = sum([layer(hidden) for layer in self.stack], start=hidden)
        return self.output(self.embedding_norm(hidden))


def test_the_forward_tells_what_comes_before_and_after_the_layers() -> None:
    found = members(Unordered())
    assert list(found) == ["embed", *NAMES_OF_LAYERS, "final_norm", "head"]
    norm = ("norm_of_embedding.weight", "norm_of_embedding.bias")
    assert {*found["embed"]} == {"token.weight", "positions", *norm}
    assert found["final_norm"] == ["embedding_norm.weight", "embedding_norm.bias"]
    assert found["head"] == ["output.weight", "output.bias"]


def test_a_plain_module_with_tied_head() -> None:
    model = PlainDecoder()
    model.output.weight = model.token.weight
    found = members(model)
    assert "token.weight" in found["embed"]
    assert found["head"] == ["output.bias"]


def test_layers_deep_inside_a_plain_module() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleDict({"token": nn.Embedding(32, 8), "encoder": nn.TransformerEncoder(layer, LAYERS)})
    assert list(members(model)) == ["embed", *NAMES_OF_LAYERS]


@pytest.mark.parametrize("first", [False, True])
def test_a_second_stack_of_layers_is_no_block_but_may_be_frozen(first: bool) -> None:
    tower = nn.ModuleDict({"tower": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})
    model = nn.Sequential(tower, PlainDecoder()) if first else nn.Sequential(PlainDecoder(), tower)
    with pytest.raises(ValueError, match=r"^parameters in no block: \d\.tower\.0\.weight, .* \.\.\.; freeze them"):
        find_blocks(model)
    tower.requires_grad_(False)
    assert list(members(model)) == ["embed", *NAMES_OF_LAYERS, "final_norm", "head"]
    assert not any(".tower." in name for names in members(model).values() for name in names)


def test_a_parameter_shared_by_layers_belongs_to_the_first() -> None:
    model = PlainDecoder()
    model.stack[2].norm = model.stack[1].norm
    found = members(model)
    assert {"stack.1.norm.weight", "stack.1.norm.bias"} <= {*found["layers.1"]}
    assert len(found["layers.2"]) == len(found["layers.1"]) - 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "no decoder layers found in Sequential: agsel needs an nn.ModuleList"),
        (nn.ModuleDict({"mixed": nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])}), "no decoder layers found"),
        (nn.ModuleDict({"empty": nn.ModuleList([nn.ReLU(), nn.ReLU()])}), "no decoder layers found"),
        (
            nn.Transformer(8, 2, 3, 3, 16, batch_first=True),
            "Transformer has 2 stacks of 3 layers: ",
        ),
        (
            AutoModelForSeq2SeqLM.from_config(
                AutoConfig.for_model("t5", vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
            ),
            "T5ForConditionalGeneration is an encoder-decoder: agsel needs a decoder-only language model",
        ),
    ],
    ids=["no list", "mixed classes", "no parameters", "two stacks", "T5"],
)
def test_models_without_decoder_layers_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as error:
        block_param_groups(model)
    assert "\n" not in str(error.value)


class WithValueHead(nn.Module):
    """As reinforcement learning wraps a language model."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = language_model
        self.v_head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 1))


@pytest.mark.parametrize("blocks", ["layers", "all"])
def test_a_trainable_value_head_is_refused_and_a_frozen_one_is_left_alone(blocks: Any) -> None:
    model = WithValueHead(tiny_decoder("llama"))
    message = r"^parameters in no block: v_head\.0\.weight, v_head\.0\.bias, v_head\.1\.weight \.\.\.; freeze them with"
    with pytest.raises(ValueError, match=message):
        block_param_groups(model, blocks)
    model.v_head.requires_grad_(False)
    groups = block_param_groups(model, blocks)
    assert len(groups) == (LAYERS if blocks == "layers" else LAYERS + 3)
    assert not any(name.startswith("v_head") for group in names_of_groups(model, groups) for name in group)


def test_layers_freezes_what_takes_no_part() -> None:
    model = tiny_decoder("llama")
    groups = block_param_groups(model)
    in_groups = names_of_groups(model, groups)
    assert in_groups == [{*members(model)[name]} for name in NAMES_OF_LAYERS]
    assert trainable(model) == set.union(*in_groups)


@pytest.mark.parametrize(("select_from", "lowest"), [(0, 0), (2, 2), (2.0, 2), (0.5, 1), (0.99, 2)])
def test_no_backward_reaches_the_layers_below(select_from: float, lowest: int) -> None:
    model = tiny_decoder("llama")
    groups = block_param_groups(model, "layers", select_from)
    layers = model.model.layers
    assert [set(group["params"]) for group in groups] == [set(layer.parameters()) for layer in layers[lowest:]]
    reached = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, __, output, number=number: reached.append((number, output.requires_grad)))
    model(input_ids=torch.arange(6)[None])
    assert reached == [(number, number >= lowest) for number in range(LAYERS)]


@pytest.mark.parametrize(
    ("blocks", "select_from", "message"),
    [
        ("layers", LAYERS, f"layers 0 to {LAYERS - 1}: choose a lower one (--select_from)"),
        ("layers", -1, "(--select_from)"),
        ("layers", 1.5, "(--select_from)"),
        ("layers", float("nan"), "(--select_from)"),
        ("all", 1, "--select_blocks layers"),
        ("all", 0.5, "--select_blocks layers"),
    ],
)
def test_no_such_lowest_layer(blocks: Any, select_from: float, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        block_param_groups(tiny_decoder("llama"), blocks, select_from)


@pytest.mark.parametrize("tied", [False, True])
def test_all_makes_every_block_a_group(tied: bool) -> None:
    model = tiny_decoder("llama", tie_word_embeddings=tied)
    everything = trainable(model)
    groups = block_param_groups(model, "all")
    assert names_of_groups(model, groups) == [{*names} for names in members(model).values()]
    assert len(groups) == LAYERS + (2 if tied else 3)
    assert trainable(model) == everything


def test_an_optimizer_takes_the_groups() -> None:
    model = tiny_decoder("llama")
    optimizer = torch.optim.AdamW(block_param_groups(model, "all"), lr=0.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert not any(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("blocks", "name"), [("layers", "layers.0"), ("all", "embed"), ("all", "final_norm")])
def test_a_frozen_block_is_refused(blocks: Any, name: str) -> None:
    model = tiny_decoder("llama")
    frozen = next(block for block in find_blocks(model) if block.name == name)
    for parameter in frozen.parameters:
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=rf"^block '{name}' is frozen: .* call requires_grad_\(True\) on it"):
        block_param_groups(model, blocks)


def test_a_partly_frozen_block_trains_the_rest() -> None:
    model = tiny_decoder("llama")
    model.model.layers[1].mlp.requires_grad_(False)
    group = names_of_groups(model, block_param_groups(model))[1]
    assert group == {name for name in members(model)["layers.1"] if ".mlp." not in name}


def test_an_unknown_value_of_blocks_is_refused() -> None:
    model = tiny_decoder("llama")
    everything = trainable(model)
    with pytest.raises(ValueError, match=r"^blocks must be 'layers' or 'all', got 'every' \(--select_blocks\)$"):
        block_param_groups(model, "every")  # type: ignore[arg-type]
    assert trainable(model) == everything


def adapted(family: str = "llama", **lora: Any) -> Any:
    return get_peft_model(tiny_decoder(family), LoraConfig(task_type="CAUSAL_LM", r=2, **lora))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bloom", "opt"])
@pytest.mark.parametrize("blocks", ["layers", "all"])
def test_the_blocks_of_an_adapted_model_are_its_adapters(family: str, blocks: Any) -> None:
    model = adapted(family, target_modules="all-linear")
    adapters = trainable(model)
    groups = names_of_groups(model, block_param_groups(model, blocks))
    assert len(groups) == LAYERS, "embedding, final norm and head have no adapters"
    assert set.union(*groups) == adapters == trainable(model)
    for index, group in enumerate(groups):
        assert all(f".{index}." in name and ".lora_" in name for name in group)


def test_layers_without_adapters_are_left_out() -> None:
    model = adapted(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2])
    first, last = names_of_groups(model, block_param_groups(model, "all"))
    assert all(".layers.0." in name for name in first)
    assert all(".layers.2." in name for name in last)


@pytest.mark.parametrize("blocks", ["layers", "all"])
def test_a_head_trained_beside_adapters(blocks: Any) -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    groups = names_of_groups(model, block_param_groups(model, blocks))
    assert len(groups) == (LAYERS if blocks == "layers" else LAYERS + 1)
    assert any("lm_head" in name for group in groups for name in group) == (blocks == "all")
    assert any("lm_head" in name for name in trainable(model)) == (blocks == "all")


def test_adapters_inside_a_value_head_model() -> None:
    model = WithValueHead(adapted(target_modules=["q_proj"], layers_to_transform=[1]))
    model.v_head.requires_grad_(False)
    assert len(block_param_groups(model)) == 1


def test_adapters_outside_the_layers_only_are_refused() -> None:
    model = adapted(target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"^no block has a trainable parameter: give the PEFT model adapters inside"):
        block_param_groups(model)


VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
TEXT = SIZES | {"model_type": "llama"}
VISION_LANGUAGE: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 5},
        "text_config": TEXT,
    },
    "qwen2_vl": {
        "vision_config": {"depth": 5, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
        "text_config": SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    },
}


@pytest.mark.parametrize("family", VISION_LANGUAGE)
@pytest.mark.parametrize("blocks", ["layers", "all"])
def test_a_vision_language_model_trains_its_text_layers(family: str, blocks: Any) -> None:
    """With a vision tower that has more layers than the text model, and norms of its own."""
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **VISION_LANGUAGE[family]))
    with pytest.raises(ValueError, match=r"^parameters in no block: model\.vis"):
        block_param_groups(model, blocks)
    text = {name for name, _ in model.named_parameters() if re.match(r"lm_head|model\.language_model\.", name)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in text)
    groups = names_of_groups(model, block_param_groups(model, blocks))
    assert len(groups) == (LAYERS if blocks == "layers" else LAYERS + 3)
    assert {name for names in members(model).values() for name in names} == text
    assert (set.union(*groups) == text) == (blocks == "all")


def test_global_numel_counts_elements() -> None:
    assert global_numel([nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]) == 17
