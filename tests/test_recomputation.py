"""Trained layers without the widest of their activations: the same gradients to the last bit, less memory."""

from __future__ import annotations

import copy
import pickle
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


def flatten(model: nn.Module) -> None:
    """Into one memory for all that trains, as ZeRO does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = torch.cat([parameter.data.view(-1) for parameter in trained])
    for parameter, part in zip(trained, flat.split([parameter.numel() for parameter in trained]), strict=True):
        parameter.data = part.view_as(parameter)


@pytest.mark.parametrize("make", [adapted_model, lambda: fuse(adapted_model())], ids=["lora", "fused lora"])
def test_adapters_whose_weights_share_their_memory(make: Callable[[], Any]) -> None:
    model = make()
    flatten(model)
    expected = gradients(model)
    recompute_inputs(decoder_layers(model))
    assert_same(gradients(model), expected)
    assert not any(kept_inputs(model))


class Gated(nn.Module):
    """A layer with an MLP; what its forward does with the products is given."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.drop, self.compute = nn.Dropout(0.5), compute

    def forward(self, inputs: Tensor) -> Tensor:
        return self.compute(self, inputs)


def gated(mlp: Any, inputs: Tensor) -> Tensor:
    return mlp.down_proj(functional.silu(mlp.gate_proj(inputs)) * mlp.up_proj(inputs))


def dropping(mlp: Any, inputs: Tensor) -> Tensor:
    return mlp.down_proj(mlp.drop(functional.silu(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)))


def in_place(mlp: Any, inputs: Tensor) -> Tensor:
    return mlp.down_proj(functional.silu(mlp.gate_proj(inputs), inplace=True) * mlp.up_proj(inputs))


def of_known_width(mlp: Any, inputs: Tensor) -> Tensor:
    return gated(mlp, inputs.view(-1, 6))


def last_twice(mlp: Any, inputs: Tensor) -> Tensor:
    between = functional.silu(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    return mlp.down_proj(between) + mlp.down_proj(between * 2)


def by_name(mlp: Any, inputs: Tensor) -> Tensor:
    return mlp.down_proj(input=functional.silu(mlp.gate_proj(inputs)) * mlp.up_proj(inputs))


def elsewhere(mlp: Any, inputs: Tensor) -> Tensor:
    return gated(getattr(mlp, "_mlp", mlp), inputs)


def learn(mlp: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    mlp.zero_grad()
    torch.manual_seed(1)
    mlp(inputs).square().sum().backward()
    return {name: p.grad.clone() for name, p in mlp.named_parameters() if p.grad is not None}


def some_inputs(scale: float = 1.0) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(2)).mul(scale)


@pytest.mark.parametrize(
    "compute", [gated, in_place, of_known_width, last_twice, by_name, elsewhere, dropping], ids=lambda c: c.__name__
)
def test_whatever_an_mlp_does_its_gradients_are_its_own(compute: Callable[[Any, Tensor], Tensor]) -> None:
    mlp, plain = Gated(compute), Gated(compute)
    assert recompute_inputs([mlp])
    learn(mlp, some_inputs())  # in which it may draw numbers twice
    assert_same(learn(mlp, some_inputs()), learn(plain, some_inputs()))


@pytest.mark.parametrize("first", [0.0, float("nan")])
def test_numbers_that_tell_nothing_decide_nothing(first: float) -> None:
    for compute, is_made_again in ((gated, True), (dropping, False)):
        mlp, plain = Gated(compute), Gated(compute)
        for each in (mlp, plain):
            for product in (each.gate_proj, each.up_proj):
                nn.init.zeros_(product.bias)
        recompute_inputs([mlp])
        learn(mlp, some_inputs(first))
        learn(mlp, some_inputs())
        assert_same(learn(mlp, some_inputs()), learn(plain, some_inputs()))
        assert is_kept(mlp) is not is_made_again


def is_kept(mlp: Any) -> bool:
    """Whether the input of its last product is, between forward and backward."""
    memories: list[weakref.ref[Any]] = []
    with mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: memories.append(weakref.ref(inputs[0].untyped_storage()))
    ):
        outputs = mlp(some_inputs())
    assert outputs.requires_grad
    return memories[0]() is not None


def test_dropout_that_begins_with_training() -> None:
    mlp, plain = Gated(dropping), Gated(dropping)
    recompute_inputs([mlp])
    assert_same(learn(mlp.eval(), some_inputs()), learn(plain.eval(), some_inputs()))
    learn(mlp.train(), some_inputs())
    assert_same(learn(mlp, some_inputs()), learn(plain.train(), some_inputs()))
    assert not is_kept(mlp.eval())


def test_several_forwards_before_backwards_that_are_repeated() -> None:
    def both(mlp: nn.Module) -> list[Tensor]:
        mlp.zero_grad()
        loss = (mlp(some_inputs()) * mlp(mlp(some_inputs(2)))).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return [parameter.grad for parameter in mlp.parameters()]

    mlp = Gated(gated)
    expected = [gradient.clone() for gradient in both(mlp)]
    recompute_inputs([mlp])
    assert all(found.equal(value) for found, value in zip(both(mlp), expected, strict=True))


def test_second_derivatives() -> None:
    def second(mlp: nn.Module) -> tuple[Tensor, ...]:
        weights = list(mlp.parameters())
        first = torch.autograd.grad(mlp(some_inputs()).square().sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), weights)

    mlp = Gated(gated)
    expected = second(mlp)
    recompute_inputs([mlp])
    for found, value in zip(second(mlp), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_outputs_that_are_changed_in_place_later_are_noticed() -> None:
    mlp = Gated(gated)
    outputs: list[Tensor] = []
    mlp.up_proj.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    recompute_inputs([mlp])
    loss = mlp(some_inputs()).sum()
    with torch.no_grad():
        outputs[0].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_a_forward_that_fails_leaves_no_hooks_behind() -> None:
    mlp = Gated(gated)
    recompute_inputs([mlp])
    learn(mlp, some_inputs())
    weight, mlp.down_proj.weight = mlp.down_proj.weight, nn.Parameter(torch.ones(6, 9))
    with pytest.raises(RuntimeError, match="shapes"):
        mlp(some_inputs())
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    mlp.down_proj.weight = weight
    assert_same(learn(mlp, some_inputs()), learn(Gated(gated), some_inputs()))


def test_a_forward_that_is_interrupted_is_tidied_up_after_by_the_next() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    mlp = Gated(gated)
    recompute_inputs([mlp])
    expected = learn(mlp, some_inputs())
    with mlp.down_proj.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
        mlp(some_inputs())
    assert_same(learn(mlp, some_inputs()), expected)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert not is_kept(mlp)


def test_whoever_handles_what_is_saved_is_given_all_of_it() -> None:
    """As offloading does, and checkpointing around a layer."""

    def handled(mlp: nn.Module) -> int:
        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor) or tensor, lambda t: t):
            mlp(some_inputs())
        return len(packed)

    mlp = Gated(gated)
    expected = handled(mlp)
    recompute_inputs([mlp])
    assert handled(mlp) == expected
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        mlp(some_inputs()).sum().backward()


def test_first_products_without_gradients_are_not_kept_instead() -> None:
    mlp = Gated(gated)
    for product in (mlp.gate_proj, mlp.up_proj):
        product.requires_grad_(False)
    recompute_inputs([mlp])
    assert is_kept(mlp)


def test_autocast() -> None:
    mlp, plain = Gated(gated), Gated(gated)
    recompute_inputs([mlp])
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = [each(some_inputs()).sum() for each in (mlp, plain)]
        for each, loss in zip((mlp, plain), losses, strict=True):
            each.zero_grad()
            loss.backward()
        assert_same(*({n: p.grad for n, p in each.named_parameters()} for each in (mlp, plain)))


def test_copies_and_pickled_models() -> None:
    mlp = Gated(gated)
    recompute_inputs([mlp])
    expected = learn(mlp, some_inputs())
    for twin in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert not is_kept(twin)
        assert_same(learn(twin, some_inputs()), expected)


def test_a_model_that_is_compiled_later() -> None:
    mlp = Gated(gated)
    recompute_inputs([mlp])
    expected = learn(mlp, some_inputs())
    mlp.compile(backend="aot_eager", fullgraph=True)
    for name, gradient in learn(mlp, some_inputs()).items():
        torch.testing.assert_close(gradient, expected[name])
