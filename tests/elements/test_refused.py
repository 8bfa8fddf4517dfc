"""What cannot have elements chosen or trained is refused in one line, and left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import agsel
from agsel.elements import ElementMask
from agsel.errors import RunError, UserError
from tests.elements.choosing_ranks import Choice, rows_of
from tests.tiny import adapted_model, random_mask, tiny_model

ROWS = rows_of(Choice(rows=2))
SIZES = {"vocab_size": 61, "hidden_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**SIZES, **TOKENS, intermediate_size=36, num_key_value_heads=1))


def neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES | {"hidden_size": 32}, **TOKENS, intermediate_size=36))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=28, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2))


def opt(dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"ffn_dim": 36, "word_embed_proj_dim": 28, "dropout": dropout, "use_cache": False}
    return OPTForCausalLM(OPTConfig(**SIZES, **TOKENS, **sizes))


def gemma() -> PreTrainedModel:
    return GemmaForCausalLM(GemmaConfig(**SIZES, **TOKENS, intermediate_size=36, num_key_value_heads=1, head_dim=14))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, intermediate_size=36, num_key_value_heads=1, head_dim=14))


def with_shared_weights() -> nn.Module:
    model = tiny_model()
    model.model.layers[2].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    return model


def with_shared_modules() -> nn.Module:
    model = tiny_model()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    return model


def with_a_layer_twice() -> nn.Module:
    model = tiny_model()
    model.model.layers[2] = model.model.layers[0]
    return model


def with_another_linear() -> nn.Module:
    class Quantised(nn.Linear):
        """As bitsandbytes' layers."""

    model = tiny_model()
    model.model.layers[1].mlp.up_proj = Quantised(28, 36, bias=False)
    return model


def with_elements() -> nn.Module:
    model = tiny_model()
    agsel.use_elements(model, random_mask(model, 0.1))
    return model


def one_line(error: type[Exception], action: Callable[[], Any]) -> str:
    with pytest.raises(error) as raised:
        action()
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, math.nan, math.inf])
def test_density(density: float) -> None:
    message = one_line(UserError, lambda: agsel.choose_elements(tiny_model(), ROWS, density=density))
    assert message.startswith(f"element_density must be a share of the weights, above 0 and at most 1, got {density:g}")


def test_method() -> None:
    message = one_line(UserError, lambda: agsel.choose_elements(tiny_model(), ROWS, method="galop"))
    assert message == "there is no method 'galop': use gallop, gem, saft (--elements)"


MODELS: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "phi3": ("gem", phi3, "gem (--elements) chooses among q_proj and v_proj, and the decoder layers have none"),
    "neox": ("gem", neox, "gem (--elements) chooses among q_proj and v_proj, and the decoder layers have none"),
    "gpt2": ("gallop", gpt2, "chooses among linear layers, and the decoder layers have none: use another model"),
    "adapters": ("gallop", adapted_model, "the model has adapters"),
    "another linear": ("saft", with_another_linear, "up_proj.weight belongs to a Quantised"),
    "elements": ("saft", with_elements, "has trained elements already: call agsel.use_elements once"),
    "shared weights": ("gallop", with_shared_weights, "layers.2.mlp.gate_proj.weight are the same weight"),
    "shared modules": ("gem", with_shared_modules, "are the same weight"),
    "a layer twice": ("saft", with_a_layer_twice, "are the same weight"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str) -> None:
    method, build, expected = MODELS[case]
    model = build()
    assert expected in one_line(UserError, lambda: agsel.choose_elements(model, ROWS, method=method))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("build", [phi3, neox, opt, gemma, qwen3])
def test_other_models_are_fine(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    mask = agsel.choose_elements(model, ROWS, method="saft", density=0.05)
    linear = [m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n]
    assert mask.numel == round(0.05 * sum(linear))
    agsel.use_elements(model, mask)
    model(**ROWS[0]).loss.backward()


def test_a_budget_that_a_matrix_has_no_room_for() -> None:
    message = one_line(UserError, lambda: agsel.choose_elements(tiny_model(), ROWS, method="gem", density=0.21))
    assert "of the 392 elements of" in message
    assert "v_proj.weight: lower it (--element_density)" in message


def test_a_budget_that_all_matrices_have_no_room_for_is_refused_before_there_is_a_gradient() -> None:
    def loss(_: object) -> torch.Tensor:
        raise AssertionError

    message = one_line(
        UserError, lambda: agsel.choose_elements(tiny_model(), ROWS, method="gem", density=0.5, loss=loss)
    )
    assert "10,752 of the 4,704 elements of q_proj and v_proj" in message


def test_a_loss_without_gradient() -> None:
    model = tiny_model()
    for method in ("gallop", "gem", "saft"):
        message = one_line(
            RunError,
            lambda method=method: agsel.choose_elements(
                model, ROWS, method=method, loss=lambda batch: 0 * model(**batch).loss
            ),
        )
        assert "the gradients are zero at the initial weights" in message
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_not_numbers() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan
    assert f"the gradient of {WEIGHT} is not finite" in one_line(RunError, lambda: agsel.choose_elements(model, ROWS))


def test_some_layers_alone() -> None:
    model = tiny_model()
    blocks = agsel.find_blocks(model)[2:4]
    mask = agsel.choose_elements(model, ROWS, density=0.1, blocks=blocks)
    linear = [m.weight.numel() for m in model.model.layers[1:3].modules() if isinstance(m, nn.Linear)]
    assert mask.numel == round(0.1 * sum(linear))
    assert {name.split(".")[2] for name in mask.indices} == {"1", "2"}
    with_all = agsel.choose_elements(model, ROWS, density=1.0)
    assert {name.split(".")[2] for name in with_all.indices} == {"0", "1", "2", "3"}


def test_layers_with_dropout_of_their_own() -> None:
    """It is off, also where layers are called through gradient checkpointing, which needs training mode."""
    expected = agsel.choose_elements(opt(), ROWS)
    for checkpointing in (False, True):
        model = opt(dropout=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert agsel.choose_elements(model, ROWS).checksum == expected.checksum
        assert all(module.training for module in model.modules())


def test_checkpointing_is_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opt().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    for layer in model.model.decoder.layers:
        function = layer._gradient_checkpointing_func
        monkeypatch.setattr(
            layer, "_gradient_checkpointing_func", lambda *a, f=function, **k: (calls.append(1), f(*a, **k))[1]
        )
    agsel.choose_elements(model, ROWS)
    assert len(calls) == len(ROWS) * len(model.model.decoder.layers)


def test_gradients_from_before_do_not_count() -> None:
    model = tiny_model()
    model(**rows_of(Choice(rows=4))[3]).loss.backward()
    assert agsel.choose_elements(model, ROWS).checksum == agsel.choose_elements(tiny_model(), ROWS).checksum


INVALID: dict[str, Tensor] = {
    "too large": torch.tensor([0, 784], dtype=torch.int32),
    "negative": torch.tensor([-1, 3], dtype=torch.int32),
    "unsorted": torch.tensor([5, 3], dtype=torch.int32),
    "twice the same": torch.tensor([3, 3], dtype=torch.int32),
    "none": torch.tensor([], dtype=torch.int32),
    "int64": torch.tensor([1, 2]),
    "in rows": torch.tensor([[1, 2]], dtype=torch.int32),
}


@pytest.mark.parametrize("case", INVALID)
def test_indices_by_hand(case: str) -> None:
    mask = random_mask(tiny_model(), 0.1)
    refuse(ElementMask({**mask.indices, WEIGHT: INVALID[case]}, mask.shapes), f"the mask of {WEIGHT} is not valid")


def refuse(mask: ElementMask, expected: str, model: nn.Module | None = None) -> None:
    model = model or tiny_model()
    before = [(type(module), module.training) for module in model.modules()]
    assert expected in one_line(UserError, lambda: agsel.use_elements(model, mask))
    assert before == [(type(module), module.training) for module in model.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_masks_of_another_model() -> None:
    mask = random_mask(tiny_model(), 0.1)
    refuse(mask, "this one has no linear layer with the weight model.layers.3.", tiny_model(layers=3))
    refuse(mask, "is 36 x 28 there and 40 x 28 here", tiny_model(intermediate=40))
    refuse(ElementMask(mask.indices, {}), f"the mask of {WEIGHT} is not valid")
    refuse(ElementMask({}, {}), "the mask has no elements")
    norm = "model.norm.weight"
    refuse(
        ElementMask({norm: torch.tensor([1]).int()}, {norm: (28,)}), "has no linear layer with the weight model.norm"
    )


def test_models_that_cannot_have_elements() -> None:
    mask = random_mask(tiny_model(), 0.1)
    refuse(mask, "are the same weight", with_shared_weights())
    refuse(mask, "belongs to a Quantised", with_another_linear())
    head = ElementMask({"lm_head.weight": torch.tensor([1]).int()}, {"lm_head.weight": (61, 28)})
    refuse(head, "model.embed_tokens.weight and lm_head.weight are the same weight", tiny_model(tied=True))
    agsel.use_elements(tiny_model(), head)


def test_elements_twice() -> None:
    model = tiny_model()
    mask = random_mask(model, 0.1)
    agsel.use_elements(model, mask)
    assert "call agsel.use_elements once" in one_line(UserError, lambda: agsel.use_elements(model, mask))
