"""Choosing elements before training by the gradient at the initial weights: GaLLoP, GEM, SAFT."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from agsel.blocks import Block, decoder_layers
from agsel.elements.collectives import gathered, reduced
from agsel.elements.gradients import GradientShares
from agsel.elements.largest import largest
from agsel.elements.layer import require_own, require_plain
from agsel.elements.mask import ElementMask
from agsel.elements.whole_weights import whole, whole_layer_by_layer
from agsel.errors import RunError, UserError
from agsel.modes import evaluating, without_logits

NOTHING_TO_CHOOSE_BY = (
    "the gradients are zero at the initial weights: there is nothing to choose elements by, look at the data"
)
EPSILON = 1e-8
"""Beside a weight that is divided by, and in the logarithm of an entropy (GaLLoP, arXiv 2510.19778; GEM's code)."""


@dataclass(frozen=True)
class Method:
    """How elements are chosen.

    Attributes:
        rule: for people.
        score: fp32 of gradient and weight: the larger, the rather an element is chosen.
        modules: names of the linear layers whose elements are scored; None for all.
        by_matrix: whether each matrix has a budget of its own.
    """

    rule: str
    score: Callable[[Tensor, Tensor], Tensor]
    modules: tuple[str, ...] | None = None
    by_matrix: bool = False


def _relative(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.abs() / (weight.float().abs() + EPSILON)


def _absolute(gradient: Tensor, _: Tensor) -> Tensor:
    return gradient.abs()


METHODS = {
    "gallop": Method("the largest |gradient| / |weight| of all", _relative),
    "gem": Method(
        "the largest |gradient| / |weight| of each q and v projection, more where they are spread and large",
        _relative,
        ("q_proj", "v_proj"),
        by_matrix=True,
    ),
    "saft": Method("the largest |gradient| of all", _absolute),
}
"""GaLLoP (arXiv 2510.19778), GEM (arXiv 2508.16191, budgets as in its code), SAFT (arXiv 2407.03036), by name."""


def choose_elements(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    method: str = "gallop",
    density: float = 0.01,
    loss: Callable[[Any], Tensor] | None = None,
    blocks: Iterable[Block] | None = None,
    group: Any = None,
) -> ElementMask:
    """The elements that a method chooses by the gradient of the summed losses of all batches of all ranks.

    `density` of the weights in the linear layers of the decoder layers are chosen, rounded to the nearest number, one
    at least; of equal scores the first in the order of the model. The choice is exact, and depends on the number of
    ranks only by the rounding of sums in fp32. There is no dropout. Gradients that parameters have are dropped. Every
    rank must call it.

    Args:
        model: whole on its device, or partitioned by ZeRO-3; not in an engine.
        batches: this rank's share of the rows.
        method: of `METHODS`.
        density: share of the weights, above 0, at most 1.
        loss: of one batch, a sum over its tokens or rows rather than a mean, so that batches count by what is in them;
            by default `model(**batch).loss`.
        blocks: the decoder layers that are scored, by default all; the density is of their weights.
        group: process group of the ranks.

    Raises:
        UserError: density or method are out of their range, a rank has no batch, the model has no such layers or
            quantised, adapted or shared ones, or a matrix is too small for its budget.
        RunError: a gradient is not finite, or all are zero.
    """
    require_method(method)
    require_density(density)
    chosen = METHODS[method]
    all_layers = linear_weights(model, blocks)
    layers = [candidates(layer, method) for layer in all_layers]
    shapes = {name: shape for layer in all_layers for name, shape in _shapes(layer).items()}
    sought = " and ".join(chosen.modules) if chosen.modules else "linear layers"
    if not any(layers):
        remedy = "choose another method" if chosen.modules else "use another model"
        raise UserError(f"{method} (--elements) chooses among {sought}, and the decoder layers have none: {remedy}")
    budget = max(1, round(density * sum(shape.numel() for shape in shapes.values())))
    _require_room(sought, budget, sum(shapes[name].numel() for layer in layers for name in layer))
    scores = _scores(model, batches, loss or partial(_own_loss, model), layers, shapes, chosen, group)
    if chosen.by_matrix:
        budgets = _budgets(scores.shares, budget, shapes, group)
        places = {name: _largest({name: scores.shares[name]}, own, group)[name] for name, own in budgets.items() if own}
    else:
        places = _largest(scores.shares, budget, group)
    indices = _on_all_ranks({name: own + scores.offset(name) for name, own in places.items()}, group)
    return ElementMask(
        {name: own for name, own in indices.items() if own.numel()},
        {name: tuple(shapes[name]) for name, own in indices.items() if own.numel()},
        {"method": method, "density": density},
    )


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch, **without_logits(model)).loss


def require_method(method: str) -> None:
    """Refuse an unknown one.

    Raises:
        UserError: names those that there are.
    """
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}: use {', '.join(METHODS)} (--elements)")


def require_density(density: float) -> None:
    """Refuse what is no share.

    Raises:
        UserError: names the flag.
    """
    if not 0 < density <= 1:
        raise UserError(
            f"element_density must be a share of the weights, above 0 and at most 1, got {density:g} "
            "(--element_density)"
        )


def linear_weights(model: nn.Module, blocks: Iterable[Block] | None) -> list[dict[str, nn.Parameter]]:
    """The weights of the linear layers by name, of each decoder layer among some blocks, by default of all.

    Raises:
        UserError: one is quantised.
    """
    name_of = {id(module): name for name, module in model.named_modules()}
    wanted = None if blocks is None else {block.name for block in blocks}
    layers = []
    for number, layer in enumerate(decoder_layers(model)):
        if wanted is not None and f"layers.{number}" not in wanted:
            continue
        found = {f"{name_of[id(m)]}.weight": m for m in layer.modules() if isinstance(m, nn.Linear)}
        for name, module in found.items():
            require_plain(name, module)
        layers.append({name: module.get_parameter("weight") for name, module in found.items()})
    require_own(model, [name for layer in layers for name in layer])
    return layers


def candidates(layer: Mapping[str, nn.Parameter], method: str) -> dict[str, nn.Parameter]:
    """Of the linear weights of a layer those that a method scores."""
    modules = METHODS[method].modules
    return {name: weight for name, weight in layer.items() if modules is None or name.split(".")[-2] in modules}


def _shapes(weights: Mapping[str, nn.Parameter]) -> dict[str, torch.Size]:
    with whole(weights.values()):
        return {name: weight.shape for name, weight in weights.items()}


def _scores(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    layers: Sequence[Mapping[str, nn.Parameter]],
    shapes: Mapping[str, torch.Size],
    method: Method,
    group: Any,
) -> GradientShares:
    """Shares of the scores of all candidates."""
    device = next(model.parameters()).device
    rounds = _most_batches(batches, device, group)
    required = [parameter.requires_grad for parameter in model.parameters()]
    scored = {id(weight) for layer in layers for weight in layer.values()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in scored)
            parameter.grad = None
        gradients = GradientShares(layers, shapes, device, group)
        with evaluating(model, recomputing=True), gradients.watch(), whole_layer_by_layer(model):
            for number in range(rounds):
                is_own = number < len(batches)  # else to take part in what the ranks do together
                value = loss(batches[number if is_own else 0])
                (value if is_own else 0 * value).backward()
                gradients.end_backward()
    finally:
        for parameter, before in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(before)
    for layer in layers:
        with whole(layer.values()), torch.no_grad():
            for name, weight in layer.items():
                share = gradients.shares[name]
                share.copy_(method.score(share, gradients.own_part(name, weight)))
    _require_sound(gradients.shares, device, group)
    return gradients


def _most_batches(batches: Sequence[Any], device: torch.device, group: Any) -> int:
    """How many batches the rank has that has most.

    Raises:
        UserError: on every rank; one has none.
    """
    counts = torch.tensor([len(batches), -len(batches)], device=device)
    most, fewest = reduced(counts, group, dist.ReduceOp.MAX).tolist()
    if fewest == 0:
        raise UserError("a rank has no samples to choose elements by: give it more rows (--element_samples)")
    return most


def _require_sound(shares: Mapping[str, Tensor], device: torch.device, group: Any) -> None:
    wrong = [not bool(share.isfinite().all()) for share in shares.values()]
    seen = torch.tensor([*wrong, any(bool(share.any()) for share in shares.values())], device=device).int()
    *not_finite, not_zero = reduced(seen, group).tolist()
    for name, count in zip(shares, not_finite, strict=True):
        if count:
            raise RunError(
                f"the gradient of {name} is not finite at the initial weights: look at the data, or train in bf16 "
                "(--bf16)"
            )
    if not not_zero:
        raise RunError(NOTHING_TO_CHOOSE_BY)


def _budgets(scores: Mapping[str, Tensor], budget: int, shapes: Mapping[str, torch.Size], group: Any) -> dict[str, int]:
    """Elements of each matrix by norm x entropy of its scores (GEM), rounded so that they add up to the budget.

    With p = scores / their sum, the entropy is -sum p log(p + 1e-8). Where rounding leaves some, those with the largest
    fraction get one more, earlier ones first.
    """
    sums = _summed([share.double().sum() for share in scores.values()], group)
    measures = []
    for share, total in zip(scores.values(), sums, strict=True):
        shares = share.double() / total if total else torch.zeros_like(share, dtype=torch.float64)
        measures += [share.double().square().sum(), -(shares * (shares + EPSILON).log()).sum()]
    measured = _summed(measures, group)
    pairs = zip(measured[::2], measured[1::2], strict=True)
    weights = [math.sqrt(squares) * max(0.0, entropy) for squares, entropy in pairs]
    if not sum(weights) > 0:
        raise RunError(NOTHING_TO_CHOOSE_BY)
    exact = [budget * weight / sum(weights) for weight in weights]
    budgets = [math.floor(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda index: (budgets[index] - exact[index], index))
    for index in by_rest[: budget - sum(budgets)]:
        budgets[index] += 1
    for name, own in zip(scores, budgets, strict=True):
        _require_room(name, own, shapes[name].numel())
    return dict(zip(scores, budgets, strict=True))


def _require_room(where: str, budget: int, numel: int) -> None:
    if budget > numel:
        raise UserError(
            f"element_density asks for {budget:,} of the {numel:,} elements of {where}: lower it "
            "(--element_density), or use another method (--elements)"
        )


def _summed(numbers: Sequence[Tensor], group: Any) -> list[float]:
    """Over the ranks, of fp64 numbers."""
    return reduced(torch.stack(list(numbers)), group).tolist()


def _largest(scores: Mapping[str, Tensor], budget: int, group: Any) -> dict[str, Tensor]:
    return dict(zip(scores, largest(list(scores.values()), budget, group), strict=True))


def _on_all_ranks(indices: Mapping[str, Tensor], group: Any) -> dict[str, Tensor]:
    """int32 on the CPU: those of all ranks, whose shares follow one another, by weight."""
    counts = torch.tensor([own.numel() for own in indices.values()], device=next(iter(indices.values())).device)
    flat = torch.cat(list(indices.values())).int()
    all_counts = [own.tolist() for own in gathered(counts, group)]
    longest = max(map(sum, all_counts))
    padded = torch.cat([flat, flat.new_zeros(longest - flat.numel())])
    pieces = [
        of_rank.cpu()[: sum(own)].split(own) for own, of_rank in zip(all_counts, gathered(padded, group), strict=True)
    ]
    return {name: torch.cat(own) for name, own in zip(indices, zip(*pieces, strict=True), strict=True)}
