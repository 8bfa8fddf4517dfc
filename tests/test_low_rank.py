"""LoRA layers of agsel against PEFT's own: the same results and gradients, fewer activations, no other case touched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft.tuners.lora
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from agsel import upstream
from agsel.adapters import fuse_adapters, scaled_adapters
from agsel.blocks import decoder_layers
from agsel.errors import UserError
from agsel.low_rank import FusedLinear
from tests.tiny import adapted_model, tiny_batch, tiny_model

ROWS, LENGTH, WIDTH, OUTPUTS, RANK = 3, 7, 10, 6, 2


class Holder(nn.Module):
    """A model of one linear layer."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, OUTPUTS, bias=bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs)


def adapted_layer(*, bias: bool = False, scaling: float = 1.5, **settings: Any) -> Any:
    """PEFT's layer in fp64, whose adapter adds something from the start."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=scaling * RANK, target_modules=["linear"], init_lora_weights=False, **settings
    )
    return get_peft_model(Holder(bias), config).double().base_model.model.linear


def set_training(layer: nn.Module, trains: bool) -> None:
    """Of the adapter; the weight stays as it is."""
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(trains and "lora_" in name)


def results(layer: nn.Module, *, trains: bool, needs_inputs: bool = True) -> dict[str, Tensor | None]:
    """Outputs and gradients of a layer whose adapter trains or does not."""
    set_training(layer, trains)
    layer.zero_grad()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROWS, LENGTH, WIDTH, generator=generator, dtype=torch.float64).requires_grad_(needs_inputs)
    outputs = layer(inputs)
    if outputs.requires_grad:
        outputs.backward(torch.randn(outputs.shape, generator=generator, dtype=torch.float64))
    return {"outputs": outputs.detach(), "inputs": inputs.grad} | {n: p.grad for n, p in layer.named_parameters()}


def assert_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), name
        if value is not None:
            torch.testing.assert_close(
                found[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )


def fused(layer: nn.Module, *, fold: bool = False) -> Any:
    """A copy of a layer that computes in agsel's way."""
    twin = copy.deepcopy(layer)
    fuse_adapters([twin], fold=fold)
    assert type(twin) is FusedLinear
    return twin


@pytest.mark.parametrize("needs_inputs", [True, False])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_those_of_peft(bias: bool, trains: bool, fold: bool, needs_inputs: bool) -> None:
    layer = adapted_layer(bias=bias)
    expected = results(layer, trains=trains, needs_inputs=needs_inputs)
    assert_close(results(fused(layer, fold=fold), trains=trains, needs_inputs=needs_inputs), expected)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    "inputs",
    [
        torch.ones(WIDTH),
        torch.arange(WIDTH * 50).view(WIDTH, 50).t(),
        torch.arange(WIDTH * 50).view(WIDTH, 5, 10).permute(2, 1, 0),
        torch.arange(WIDTH * 100).view(5, 10, 2 * WIDTH)[..., ::2],
        torch.ones(1, 1, WIDTH).expand(5, 10, WIDTH),
        torch.ones(2, 0, WIDTH),
    ],
    ids=["one token", "transposed", "permuted", "every second", "expanded", "no token"],
)
def test_inputs_of_any_layout(inputs: Tensor, fold: bool) -> None:
    layer = adapted_layer(bias=True)

    def of(module: Any) -> dict[str, Tensor | None]:
        module.zero_grad()
        given = inputs.double().div(100).requires_grad_()
        outputs = module(given)
        outputs.transpose(0, -1).square().sum().backward()
        return {"outputs": outputs.detach(), "inputs": given.grad} | {n: p.grad for n, p in module.named_parameters()}

    assert_close(of(fused(layer, fold=fold)), of(layer))


@pytest.mark.parametrize("only", ["lora_A", "lora_B"])
def test_one_half_of_an_adapter_may_train_alone(only: str) -> None:
    layer = adapted_layer()

    def half(module: Any) -> dict[str, Tensor | None]:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(only in name)
        module(torch.ones(ROWS, WIDTH, dtype=torch.float64)).square().sum().backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    assert_close(half(fused(layer)), half(layer))


def test_results_without_gradients_are_those_of_peft() -> None:
    layer = adapted_layer(bias=True)
    inputs = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    for module in (fused(layer), fused(layer, fold=True), fused(layer).eval(), fused(layer, fold=True).eval()):
        with torch.no_grad():
            torch.testing.assert_close(module(inputs), layer(inputs), rtol=1e-12, atol=1e-12)


def test_a_scaled_adapter_is_scaled() -> None:
    layer = adapted_layer()
    twin = fused(layer)
    with scaled_adapters([twin], 0.25), scaled_adapters([layer], 0.25):
        assert_close(results(twin, trains=True), results(layer, trains=True))


def saved_bytes(layer: nn.Module, trains: bool) -> int:
    """Of activations that a forward keeps for the backward, weights not counted."""
    set_training(layer, trains)
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    inputs = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(inputs)
    return sum(saved.values())


def test_a_frozen_adapter_keeps_no_activations() -> None:
    tokens = ROWS * LENGTH * torch.float64.itemsize
    assert saved_bytes(fused(adapted_layer()), trains=True) == tokens * (WIDTH + RANK)
    assert saved_bytes(fused(adapted_layer()), trains=False) == 0
    assert saved_bytes(fused(adapted_layer(), fold=True), trains=True) == tokens * WIDTH
    assert saved_bytes(fused(adapted_layer(), fold=True), trains=False) == 0


def products_of(layer: nn.Module, monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[str]:
    """Which of agsel's two ways a forward goes."""
    from agsel import low_rank

    taken: list[str] = []
    for name in ("_Product", "_FoldedProduct"):
        product = getattr(low_rank, name)

        def apply(*arguments: Any, name: str = name, original: Callable[..., Tensor] = product.apply) -> Tensor:
            taken.append(name)
            return original(*arguments)

        monkeypatch.setattr(product, "apply", apply)
    layer(torch.randn(tokens, WIDTH, dtype=torch.float64))
    monkeypatch.undo()
    return taken


def test_folds_only_in_training_and_where_it_is_less_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fused(adapted_layer(), fold=True)
    worth = WIDTH * OUTPUTS // (WIDTH + OUTPUTS) + 1  # tokens, from which on two small products are more
    for trains in (True, False):
        set_training(layer, trains)
        assert products_of(layer.train(), monkeypatch, worth) == ["_FoldedProduct"]
        assert products_of(layer.train(), monkeypatch, worth - 1) == ["_Product"]
        assert products_of(layer.eval(), monkeypatch, worth) == ["_Product"]
    assert products_of(fused(adapted_layer()), monkeypatch, worth) == ["_Product"]


def dropping() -> Any:
    return adapted_layer(lora_dropout=0.5)


def with_bias_in_adapter() -> Any:
    return adapted_layer(bias=True, lora_bias=True)


def switched_off() -> Any:
    layer = adapted_layer()
    layer.enable_adapters(False)
    return layer


def merged() -> Any:
    layer = adapted_layer()
    layer.merge()
    return layer


def two_adapters() -> Any:
    layer = adapted_layer()
    layer.update_layer("other", RANK, lora_alpha=RANK, config=LoraConfig(r=RANK, init_lora_weights=False))
    layer.set_adapter(["default", "other"])
    return layer.double()


def with_trained_bias() -> Any:
    layer = adapted_layer(bias=True)
    layer.base_layer.bias.requires_grad_(True)
    return layer


def hooked() -> Any:
    layer = adapted_layer()
    layer.lora_A["default"].register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return layer


def hooked_backward() -> Any:
    layer = adapted_layer()
    layer.lora_B["default"].register_full_backward_hook(lambda *_: None)
    return layer


def mixed_types() -> Any:
    layer = adapted_layer()
    layer.lora_A["default"].float()
    layer.lora_B["default"].float()
    return layer


@pytest.mark.parametrize(
    "make",
    [
        dropping,
        with_bias_in_adapter,
        switched_off,
        merged,
        two_adapters,
        with_trained_bias,
        hooked,
        hooked_backward,
        mixed_types,
    ],
)
def test_everything_else_is_left_to_peft(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    twin = fused(layer, fold=make is not dropping)
    inputs = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    assert products_of(twin, monkeypatch, tokens=50) == []
    torch.manual_seed(3)
    expected = layer(inputs)
    torch.manual_seed(3)
    assert twin(inputs).equal(expected)


def test_under_autocast_the_products_are_pefts() -> None:
    layer = adapted_layer().float()
    inputs = torch.randn(ROWS, LENGTH, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused(layer)(inputs)
        assert found.equal(layer(inputs))
    assert found.dtype == torch.bfloat16


def test_no_dropout_in_evaluation() -> None:
    layer = dropping().eval()
    assert_close(results(fused(layer).eval(), trains=True), results(layer, trains=True))


def test_other_kinds_of_adapters_are_left_alone() -> None:
    model = adapted_model(dora=True)
    expected = model(input_ids=tiny_batch(0, 0, 0)).logits
    fuse_adapters(decoder_layers(model))
    assert model(input_ids=tiny_batch(0, 0, 0)).logits.equal(expected)
    fuse_adapters(decoder_layers(tiny_model()))


@pytest.mark.parametrize("fold", [False, True])
def test_a_whole_model_learns_as_with_peft(fold: bool) -> None:
    """Some layers frozen, one below all that train; fp64."""
    models = [adapted_model().double() for _ in range(2)]
    fuse_adapters(decoder_layers(models[1]), fold=fold)
    gradients = []
    for model in models:
        for index, layer in enumerate(decoder_layers(model)):
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_("lora_" in name and index in (1, 3))
        model(input_ids=tiny_batch(0, 0, 0), labels=tiny_batch(0, 0, 0)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert sum(gradient is not None for gradient in gradients[0].values()) == 2 * 2 * 7
    assert_close(gradients[1], gradients[0])
    assert [name for name, _ in models[0].named_parameters()] == [name for name, _ in models[1].named_parameters()]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_a_fused_model_can_be_compiled() -> None:
    model, twin = adapted_model(), adapted_model()
    fuse_adapters(decoder_layers(twin), fold=True)
    for layer in decoder_layers(twin):
        layer.compile(dynamic=False, backend="aot_eager")
    for each in (model, twin):
        each(input_ids=tiny_batch(0, 0, 0), labels=tiny_batch(0, 0, 0)).loss.backward()
    for (name, parameter), expected in zip(twin.named_parameters(), model.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_another_peft_computes_itself_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(upstream.table()["checksums"], "agsel.low_rank", {"peft.tuners.lora.layer:Linear.forward": "0"})
    layer = adapted_layer()
    with pytest.warns(UserWarning, match=r"computed by PEFT, which is slower: peft .* differs from the tested"):
        fuse_adapters([layer])
    assert type(layer) is peft.tuners.lora.Linear


def test_the_peft_here_is_the_tested_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse_adapters([adapted_layer()])


@pytest.mark.parametrize(
    ("settings", "words"), [({"lora_dropout": 0.1}, "with dropout cannot be folded"), ({"use_dora": True}, "not DoRA")]
)
def test_adapters_that_cannot_be_folded_are_refused(settings: dict[str, Any], words: str) -> None:
    fuse_adapters([adapted_layer(**settings)])
    with pytest.raises(UserError, match=words):
        fuse_adapters([adapted_layer(**settings)], fold=True)
