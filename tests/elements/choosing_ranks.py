"""Elements chosen on the ranks of test_choosing.py and test_largest.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import agsel
from agsel.elements.gradients import GradientShares
from agsel.elements.largest import largest
from agsel.errors import RunError, UserError
from tests.cases import message_of, run_cases
from tests.tiny import tiny_batch, tiny_model

PARTITIONED = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


@dataclass(frozen=True)
class Choice:
    """What is chosen of which model; equal on the ranks and in the reference."""

    method: str = "gallop"
    density: float = 0.01
    model: str = "llama"
    rows: int = 7
    partitioned: bool = False
    checkpointing: bool = False
    dtype: torch.dtype = torch.float32


METHODS = ("gallop", "gem", "saft")
WHOLE = {method: Choice(method) for method in METHODS}
WHOLE |= {f"{method}-many": Choice(method, density) for method, density in zip(METHODS, (0.3, 0.03, 0.3), strict=True)}
WHOLE |= {
    "gallop-one": Choice(density=1e-9),
    "gallop-all": Choice(density=1.0),
    "gallop-ties": Choice(density=0.88, model="silent"),
    "saft-ties": Choice("saft", density=0.88, model="silent"),
    "gem-ties": Choice("gem", density=0.04, model="narrow"),
    "five": Choice(rows=5),
    "bf16": Choice(dtype=torch.bfloat16),
    "gem-bf16": Choice("gem", dtype=torch.bfloat16),
    "checkpointing": Choice(checkpointing=True),
    "routed": Choice("saft", density=0.2, model="routed"),
    "routed-all": Choice("saft", density=0.9, model="routed"),
}
PARTED = {
    f"{name}-partitioned": replace(WHOLE[name], partitioned=True)
    for name in (*METHODS, "gallop-ties", "gem-ties", "bf16", "checkpointing")
}
CHOICES = WHOLE | PARTED


class RoutedLayer(nn.Module):
    """Every batch uses one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(9, 9) for _ in range(3)])

    def forward(self, hidden: Tensor, expert: int) -> Tensor:
        return hidden + self.experts[expert](hidden).tanh()


class RoutedModel(nn.Module):
    """A batch says how many layers it uses, and which expert of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 9)
        self.layers = nn.ModuleList([RoutedLayer() for _ in range(3)])
        self.head = nn.Linear(9, 61)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        first = int(input_ids.sum()) % 9
        hidden = self.embedding(input_ids)
        for layer in self.layers[: 1 + first // 3]:
            hidden = layer(hidden, first % 3)
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
        return type("Output", (), {"loss": loss})


def model_of(choice: Choice) -> nn.Module:
    """Some weights are frozen and some modules are evaluating, which is to stay so."""
    if choice.model == "routed":
        torch.manual_seed(2)
        return RoutedModel()
    model = tiny_model(layers=1 if choice.model == "narrow" else 4, dtype=choice.dtype)
    with torch.no_grad():
        if choice.model == "silent":  # what comes before weights of zeros gets gradients of zeros
            for layer in model.model.layers[1::2]:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        if choice.model == "narrow":  # and what comes after inputs of zeros
            model.model.embed_tokens.weight[:, 3:-3] = 0
    model.train()
    if choice.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.layers[-1].mlp.eval()
    model.model.layers[-1].self_attn.q_proj.requires_grad_(False)
    return model


def rows_of(choice: Choice) -> list[dict[str, Tensor]]:
    """All batches, of 1 to 3 rows."""
    ids = [tiny_batch(index, 0, 0, rows=1 + index % 3) for index in range(choice.rows)]
    return [{"input_ids": own, "labels": own} for own in ids]


def summed_loss(model: nn.Module) -> Callable[[Any], Tensor]:
    """Over the tokens of a batch."""
    return lambda batch: model(**batch).loss * batch["labels"].numel()


def world() -> tuple[int, int]:
    """This rank and the number of ranks."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def chosen(choice: Choice) -> dict[str, Any]:
    """The mask, and whether the model is as it was."""
    rank, ranks = world()
    model = model_of(choice)
    before = state_of(model)
    if choice.partitioned:
        deepspeed.zero.Init(module=model, config_dict_or_path=PARTITIONED)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
    hooks = hooks_of(model)
    mask = agsel.choose_elements(
        model,
        rows_of(choice)[rank::ranks],
        method=choice.method,
        density=choice.density,
        loss=summed_loss(model),
    )
    if choice.partitioned:
        assert all(parameter.numel() == 0 for parameter in model.parameters())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        after = state_of(model)
    return {
        "indices": dict(mask.indices),
        "shapes": dict(mask.shapes),
        "about": dict(mask.about),
        "changed": [name for name, value in before.items() if not torch.equal(value, after[name])],
        "hooks": hooks_of(model) - hooks,
    }


def hooks_of(model: nn.Module) -> int:
    """How many modules and parameters have."""
    of_modules = [(*m._forward_hooks, *m._forward_pre_hooks, *m._backward_pre_hooks) for m in model.modules()]
    of_parameters = [tuple(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return sum(map(len, of_modules + of_parameters))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights, flags, gradients and modes."""
    state = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    state |= {f"{name} required": torch.tensor(weight.requires_grad) for name, weight in model.named_parameters()}
    state |= {f"{name} gradient": torch.tensor(weight.grad is None) for name, weight in model.named_parameters()}
    return state | {f"{name} mode": torch.tensor(module.training) for name, module in model.named_modules()}


def memory() -> dict[str, Any]:
    """Numbers in the gradients that are alive at once, as each arrives."""
    model = tiny_model()
    model.train()
    alive: list[tuple[StorageWeakRef, int]] = []
    most = 0

    def see(parameter: nn.Parameter) -> None:
        nonlocal alive, most
        assert parameter.grad is not None
        alive.append((StorageWeakRef(parameter.grad.untyped_storage()), parameter.numel()))
        alive = [(storage, numel) for storage, numel in alive if not storage.expired()]
        most = max(most, sum(numel for _, numel in alive))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(see)
    rank, ranks = world()
    agsel.choose_elements(model, rows_of(Choice())[rank::ranks])
    alive = [(storage, numel) for storage, numel in alive if not storage.expired()]
    return {"most": most, "left": len(alive)}


def shares() -> dict[str, dict[str, tuple[int, str]]]:
    """Lengths and type of a rank's shares of weights, some with fewer elements than there are ranks."""
    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    weights = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    held = GradientShares([weights], shapes, torch.device("cpu"), None)
    return {name: (share.numel(), str(share.dtype)) for name, share in held.shares.items()}


SHAPES = {"odd": (5, 7), "even": (4, 8), "few": (1, 3), "one": (1, 1)}


def nothing_on_a_rank() -> str | None:
    model = tiny_model()
    batches = rows_of(Choice()) if world()[0] == 0 else []
    return message_of(UserError, lambda: agsel.choose_elements(model, batches))


def not_a_number(partitioned: bool) -> str | None:
    """Of the gradient; one rank sees it alone."""
    model = tiny_model()
    if partitioned:
        deepspeed.zero.Init(module=model, config_dict_or_path=PARTITIONED)
    rank, ranks = world()
    factor = float("nan") if rank == ranks - 1 else 1.0
    loss = summed_loss(model)
    batches = rows_of(Choice())[rank::ranks]
    return message_of(RunError, lambda: agsel.choose_elements(model, batches, loss=lambda batch: factor * loss(batch)))


def numbers(kind: str) -> list[Tensor]:
    """Vectors that are hard to sort."""
    generator = torch.Generator().manual_seed(5)

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    return {
        "plain": [random(1000), random(37), random(5)],
        "few values": [(random(500) * 4).floor(), (random(301) * 4).floor(), (random(3) * 4).floor()],
        "all equal": [torch.full((50,), 0.25), torch.full((3,), 0.25), torch.full((20,), 0.25)],
        "zeros": [torch.zeros(40), torch.zeros(1), random(5), torch.zeros(9)],
        "denormals": [(random(300) * 50).floor() * 1e-45, random(20) * 1e-39, torch.zeros(10)],
        "ranges": [10 ** (random(400) * 76 - 38), torch.tensor([0.0, torch.finfo(torch.float32).max, 1e-45])],
        "neighbours": [torch.full((90,), 1.0), torch.full((30,), 1.0).nextafter(torch.tensor(2.0)), torch.ones(9)],
        "half way": [torch.arange(1 << 8).float().mul(1 << 8).add(bits).int().view(torch.float32) for bits in (0, 1)],
        "many small": [(random(index % 5) * 3).floor() for index in range(300)],
    }[kind]


KINDS = ("plain", "few values", "all equal", "zeros", "denormals", "ranges", "neighbours", "half way", "many small")


def budgets_of(vectors: list[Tensor]) -> list[int]:
    total = sum(vector.numel() for vector in vectors)
    return sorted({1, 2, total // 3, total // 2, total - 1, total})


def spread_largest() -> dict[str, list[list[list[int]]]]:
    """By kind, budget and vector: this rank's positions in the whole vectors; ranks hold unequal slices, or none."""
    rank, ranks = world()
    generator = torch.Generator().manual_seed(ranks)
    found = {}
    for kind in KINDS:
        vectors = numbers(kind)
        cuts = [
            [0, *torch.randint(vector.numel() + 1, (ranks - 1,), generator=generator).sort().values.tolist(), None]
            for vector in vectors
        ]
        own = [vector[cut[rank] : cut[rank + 1]] for vector, cut in zip(vectors, cuts, strict=True)]
        found[kind] = [
            [(places + cut[rank]).tolist() for places, cut in zip(largest(own, budget), cuts, strict=True)]
            for budget in budgets_of(vectors)
        ]
    return found


CASES: dict[str, Callable[[], Any]] = {name: partial(chosen, choice) for name, choice in CHOICES.items()}
CASES |= {
    "memory": memory,
    "shares": shares,
    "nothing on a rank": nothing_on_a_rank,
    "not a number": partial(not_a_number, False),
    "not a number, partitioned": partial(not_a_number, True),
    "largest": spread_largest,
}

if __name__ == "__main__":
    run_cases(CASES)
