"""Trained layers without the widest of their activations: the same gradients to the last bit, less memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

import agsel
from agsel.adapters import fuse_adapters
from agsel.blocks import decoder_layers
from agsel.recomputation import recompute_inputs
from tests.tiny import adapted_model, element_model, tiny_batch, tiny_model

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=12),
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name](), dtype=dtype)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=tiny_batch(0, 0, 0), labels=tiny_batch(0, 0, 0)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, gradient in expected.items() if not gradient.equal(found[name])] == []


def kept_inputs(model: nn.Module) -> list[bool]:
    """Of each layer after a forward: whether the input of its MLP's last product is still in memory."""
    memories: list[weakref.ref[Any]] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        memories.append(weakref.ref(inputs[0].untyped_storage()))

    handles = [layer.mlp.down_proj.register_forward_pre_hook(note) for layer in decoder_layers(model)]
    loss = model(input_ids=tiny_batch(0, 0, 0), labels=tiny_batch(0, 0, 0)).loss
    for handle in handles:
        handle.remove()
    assert loss.requires_grad
    return [memory() is not None for memory in memories]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    expected = gradients(model)
    assert kept_inputs(model) == [True] * 3
    handles = recompute_inputs(decoder_layers(model))
    assert_same(gradients(model), expected)
    assert kept_inputs(model) == [False] * 3
    for handle in handles:
        handle.remove()
    assert kept_inputs(model) == [True] * 3
    assert_same(gradients(model), expected)


def test_a_frozen_last_product_keeps_nothing_anyway() -> None:
    model = model_of("llama")
    decoder_layers(model)[1].requires_grad_(False)
    expected = gradients(model)
    assert kept_inputs(model) == [True, False, True]
    recompute_inputs(decoder_layers(model))
    assert_same(gradients(model), expected)
    assert kept_inputs(model) == [False] * 3


def test_what_is_trained_may_change_from_step_to_step() -> None:
    model, plain = model_of("llama"), model_of("llama")
    recompute_inputs(decoder_layers(model))
    for trained in (0, 2, 1):
        for each in (model, plain):
            for index, layer in enumerate(decoder_layers(each)):
                layer.requires_grad_(index == trained)
        assert_same(gradients(model), gradients(plain))


@pytest.mark.parametrize(
    "make", [adapted_model, lambda: fuse(adapted_model()), element_model], ids=["lora", "fused lora", "elements"]
)
def test_adapters_and_elements(make: Callable[[], Any]) -> None:
    model = make()
    expected = gradients(model)
    kept = kept_inputs(model)
    recompute_inputs(decoder_layers(model))
    assert_same(gradients(model), expected)
    assert any(kept)
    assert not any(kept_inputs(model))


@pytest.mark.parametrize("make", [adapted_model, lambda: adapted_model(dora=True), lambda: model_of("llama")])
def test_weights_may_lie_in_one_piece_of_memory(make: Callable[[], Any]) -> None:
    """As ZeRO 1 and 2 lay them."""
    model = make()
    for layer in decoder_layers(model):
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        flat = torch.cat([parameter.detach().flatten() for parameter in trained])
        for parameter, piece in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            parameter.data = piece.view(parameter.shape)
    expected = gradients(model)
    recompute_inputs(decoder_layers(model))
    assert_same(gradients(model), expected)


def fuse(model: Any) -> Any:
    fuse_adapters(decoder_layers(model))
    return model


class Noisy(nn.Module):
    """Computes something else every time."""

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.dropout(functional.silu(inputs), 0.5)


def test_what_cannot_be_made_again_is_kept() -> None:
    model = model_of("llama")
    for layer in decoder_layers(model):
        layer.mlp.act_fn = Noisy()
    torch.manual_seed(1)
    expected = gradients(model)
    recompute_inputs(decoder_layers(model))
    gradients(model)  # in which it is seen, and numbers are drawn twice
    torch.manual_seed(1)
    assert_same(gradients(model), expected)
    assert kept_inputs(model) == [True] * 3


def test_checkpointed_layers_are_left_alone() -> None:
    model = model_of("llama").train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recompute_inputs(decoder_layers(model))
    assert_same(gradients(model), expected)
    outputs: list[weakref.ref[Any]] = []
    decoder_layers(model)[0].mlp.gate_proj.register_forward_hook(
        lambda _module, _inputs, output: outputs.append(weakref.ref(output.untyped_storage()))
    )
    loss = model(input_ids=tiny_batch(0, 0, 0), labels=tiny_batch(0, 0, 0)).loss
    assert [memory() for memory in outputs] == [None]
    loss.backward()


def test_compiled_layers_are_left_alone() -> None:
    model = model_of("llama")
    agsel.compile_layers(model, backend="aot_eager", dynamic=False)
    assert recompute_inputs(decoder_layers(model)) == []


def test_other_models_are_left_alone() -> None:
    for config in (
        GPT2Config(n_layer=2, n_head=2, n_embd=24, vocab_size=61),
        MixtralConfig(**SIZES, num_local_experts=2),
        Phi3Config(**SIZES),
    ):
        model = AutoModelForCausalLM.from_config(config)
        expected = gradients(model.eval())
        assert recompute_inputs(decoder_layers(model)) == []
        assert_same(gradients(model), expected)


def test_nothing_is_held_after_a_forward_without_gradient() -> None:
    model = tiny_model()
    recompute_inputs(decoder_layers(model))
    outputs: list[weakref.ref[Any]] = []
    decoder_layers(model)[0].mlp.gate_proj.register_forward_hook(
        lambda _module, _inputs, output: outputs.append(weakref.ref(output.untyped_storage()))
    )
    with torch.no_grad():
        model(input_ids=tiny_batch(0, 0, 0))
    assert [memory() for memory in outputs] == [None]
