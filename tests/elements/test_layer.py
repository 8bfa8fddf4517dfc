"""A linear layer with trained elements computes what `nn.Linear` does, and keeps less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from agsel.elements import ElementLinear, ElementMask, choose_elements, use_elements
from tests.tiny import tiny_batch, tiny_model

INDICES = torch.tensor([0, 3, 7, 8, 22, 34], dtype=torch.int32)
SHAPE = (7, 5)
INPUTS = [(5,), (4, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5)]


def pair(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> tuple[nn.Linear, ElementLinear]:
    """An ordinary layer, and one with elements of the same weight."""
    torch.manual_seed(1)
    dense = nn.Linear(5, 7, bias=bias, dtype=dtype)
    model = nn.ModuleDict({"layer": nn.Linear(5, 7, bias=bias, dtype=dtype)})
    model.load_state_dict({f"layer.{name}": value for name, value in dense.state_dict().items()})
    use_elements(model, ElementMask({"layer.weight": INDICES}, {"layer.weight": SHAPE}))
    layer = model["layer"]
    assert isinstance(layer, ElementLinear)
    return dense, layer


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", INPUTS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_forward_and_gradients_are_those_of_linear(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    dense, layer = pair(dtype, bias=bias)
    inputs, same_inputs = random(shape, dtype), random(shape, dtype)
    expected, output = dense(inputs), layer(same_inputs)
    assert torch.equal(output, expected)
    weights = random(tuple(expected.shape), dtype).detach()
    (expected * weights).sum().backward()
    (output * weights).sum().backward()
    assert inputs.grad is not None
    assert dense.weight.grad is not None
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(same_inputs.grad, inputs.grad, **tolerance)
    torch.testing.assert_close(layer.values.grad, dense.weight.grad.flatten()[INDICES.long()], **tolerance)
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == dtype
    assert layer.weight.grad is None
    assert layer.bias is None or layer.bias.grad is None


def test_values_are_the_weights() -> None:
    dense, layer = pair()
    assert torch.equal(layer.values, dense.weight.flatten()[INDICES.long()])
    with torch.no_grad():
        layer.values.copy_(torch.arange(6.0))
    layer.write()
    expected = dense.weight.detach().clone().flatten()
    expected[INDICES.long()] = torch.arange(6.0)
    assert torch.equal(layer.weight.flatten(), expected)


def test_only_the_values_are_trainable() -> None:
    _, layer = pair()
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["values"]


def saved_by(action: Callable[[], Any]) -> list[Tensor]:
    """What autograd keeps for the backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda t: t):
        action()
    return saved


def test_keeps_inputs_only_for_trainable_values() -> None:
    _, layer = pair()
    inputs = random((4, 5))
    saved = saved_by(lambda: layer(inputs))
    assert {tensor.data_ptr() for tensor in saved} == {
        inputs.data_ptr(),
        layer.weight.data_ptr(),
        layer.indices.data_ptr(),
    }
    layer.values.requires_grad_(False)
    frozen = saved_by(lambda: layer(inputs))
    assert {tensor.data_ptr() for tensor in frozen} == {layer.weight.data_ptr()}
    layer(inputs).sum().backward()
    assert layer.values.grad is None
    assert inputs.grad is not None


def test_keeps_no_weight_where_inputs_need_no_gradient_and_values_are_frozen() -> None:
    _, layer = pair()
    layer.values.requires_grad_(False)
    assert not saved_by(lambda: layer(random((4, 5)).detach()))


def test_gradient_without_that_of_the_inputs() -> None:
    dense, layer = pair()
    inputs = random((4, 5)).detach()
    dense(inputs).square().sum().backward()
    layer(inputs).square().sum().backward()
    assert dense.weight.grad is not None
    torch.testing.assert_close(layer.values.grad, dense.weight.grad.flatten()[INDICES.long()], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_autocast(dtype: torch.dtype, bias: bool) -> None:
    dense, layer = pair(dtype, bias=bias)
    inputs, same_inputs = random((2, 3, 5)), random((2, 3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, output = dense(inputs), layer(same_inputs)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, expected)
    expected.float().square().sum().backward()
    output.float().square().sum().backward()
    assert inputs.grad is not None
    assert dense.weight.grad is not None
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == dtype
    torch.testing.assert_close(same_inputs.grad, inputs.grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.values.grad, dense.weight.grad.flatten()[INDICES.long()], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_break(autocast: bool) -> None:
    _, layer = pair()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output, expected = compiled(random((4, 5))), layer(random((4, 5)))
    assert torch.equal(output, expected)
    gradients = [torch.autograd.grad(value.float().square().sum(), layer.values)[0] for value in (output, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-2 if autocast else 1e-6)
    layer.values.requires_grad_(False)
    assert torch.equal(compiled(random((4, 5))), layer(random((4, 5))))


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)], ids=str)
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    """With the values written into the weight before each forward, as optimizer steps do."""
    _, layer = pair(torch.float64)

    def run(inputs: Tensor, values: Tensor) -> Tensor:
        with torch.no_grad():
            layer.values.copy_(values)
        layer.write()
        weight = layer.weight.detach().clone()  # the next call changes it
        return type(layer).forward(Stand(weight, layer.bias, values, layer.indices), inputs)  # type: ignore[arg-type]

    values = layer.values.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (random(shape, torch.float64), values))


class Stand:
    """For a layer whose values are no parameter."""

    def __init__(self, weight: Tensor, bias: Tensor, values: Tensor, indices: Tensor) -> None:
        self.weight, self.bias, self.values, self.indices = weight, bias, values, indices


class LikeLiger(LlamaForCausalLM):
    """Its forward leaves the logits out in training only, unless it is told to."""

    told: list[bool | None]

    def forward(self, skip_logits: bool | None = None, **options: Any) -> Any:
        self.told.append(skip_logits)
        return super().forward(**options)


def test_choosing_makes_no_logits_where_the_model_can_do_without() -> None:
    model = LikeLiger(tiny_model().config)
    model.told = []
    ids = tiny_batch(0, 0, 0)
    choose_elements(model, [{"input_ids": ids, "labels": ids}])
    assert model.told == [True]
