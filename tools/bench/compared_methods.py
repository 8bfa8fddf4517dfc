"""The methods that are compared, one entry each; a policy of agsel takes a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import agsel
from agsel.errors import UserError
from agsel.policies import reads_fraction
from tools.bench.configurations import Configuration
from tools.bench.freezing import UpperLayers
from tools.bench.starters import (
    PolicyOf,
    Starter,
    start_badam,
    start_bound,
    start_full_layers,
    start_lora,
    start_selection,
    start_shira,
    start_supertuning,
    start_trainable,
    start_zero_offload,
)

if TYPE_CHECKING:
    from agsel.planning.memory import PlannedStep


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train.

    Attributes:
        meaning: what it is, in a phrase.
        start: what builds its engine; None if launch/train.py does.
        policy: agsel's, for a fraction of the layers; None if agsel does not take part.
        lora_rank: of agsel's adapters; None if it trains all weights of a layer.
        folds: whether they are added to their weights for the moment.
        reads_density: whether single weights are trained, the configuration's share of them.
        fraction_of_stock: whether a method without a policy reads the fraction, too.
        kinds: of the steps that are measured, where they are not all kinds of the policy.
    """

    meaning: str
    start: Starter | None
    policy: PolicyOf | None = None
    lora_rank: int | None = None
    folds: bool = False
    reads_density: bool = False
    fraction_of_stock: bool = False
    kinds: tuple[PlannedStep, ...] = ()

    @property
    def reads_fraction(self) -> bool:
        """Whether the fraction of the layers makes a difference."""
        return self.fraction_of_stock if self.policy is None else reads_fraction(self.policy(Configuration.fraction))

    @property
    def moves_states(self) -> bool:
        """Whether agsel selects what is trained, and keeps the optimizer states of the rest in host memory."""
        return self.policy is not None

    @property
    def kinds_of_steps(self) -> tuple[PlannedStep, ...]:
        """What kinds of steps are measured, as the memory plan names them; none if it does not cover them."""
        from agsel.planning.memory import planned_steps

        return self.kinds or (planned_steps(self.policy(Configuration.fraction)) if self.policy else ())


def selecting(
    meaning: str,
    policy: PolicyOf,
    kinds: tuple[PlannedStep, ...] = (),
    lora_rank: int | None = None,
    folds: bool = False,
    elements: bool = False,
    early: bool = False,
) -> Method:
    """agsel with the policy made from the fraction."""
    start = partial(start_selection, policy, lora_rank=lora_rank, folds=folds, elements=elements, early=early)
    return Method(
        meaning=meaning,
        start=start,
        policy=policy,
        lora_rank=lora_rank,
        folds=folds,
        reads_density=elements,
        kinds=kinds,
    )


def random_sets(every: int) -> Callable[[float], agsel.RandomBlocks]:
    """A new random set of layers every so many steps."""
    return lambda fraction: agsel.RandomBlocks(fraction=fraction, every=every)


def every_block(_: float) -> agsel.FullFineTuning:
    """No selection."""
    return agsel.FullFineTuning()


def frozen_below(fraction: float) -> UpperLayers:
    """FreezeOut when this fraction of the layers is left."""
    return UpperLayers(fraction=fraction)


def exploiting(fraction: float) -> agsel.AdaGradSelect:
    """Draws that are almost uniform: the most states to move."""
    return agsel.AdaGradSelect(fraction=fraction, explore_steps=0, dirichlet_delta=1e6)


def exploring(fraction: float) -> agsel.AdaGradSelect:
    """Every step explores."""
    return agsel.AdaGradSelect(fraction=fraction, explore_steps=10**9, epsilon_end=1.0)


METHODS: dict[str, Method] = {
    "full": Method(meaning="full fine-tuning, stock DeepSpeed", start=start_trainable, kinds=("full",)),
    "full-layers": Method(
        meaning="full fine-tuning, stock DeepSpeed told to gather whole layers, as agsel does at ZeRO-3",
        start=start_full_layers,
    ),
    "bound": Method(
        meaning="the same number of layers trainable for ever, all else frozen, stock DeepSpeed",
        start=start_bound,
        fraction_of_stock=True,
    ),
    "fixed": selecting("agsel, one set of layers for ever", random_sets(every=10**9)),
    "exploit": selecting("agsel, a new random set of layers at every step", exploiting),
    "explore": selecting(
        "agsel, the layers with the largest gradient norms, every step explores", exploring, kinds=("explore",)
    ),
    "explore-early": selecting(
        "the same with --choose_early, for several micro-batches", exploring, kinds=("explore",), early=True
    ),
    "topk": selecting("agsel's TopK policy", lambda fraction: agsel.TopK(fraction=fraction)),
    "lisa": selecting(
        "agsel, LISA: a new random set of layers every 20 steps, beside embedding, final norm and head",
        lambda fraction: agsel.Lisa(fraction=fraction),
    ),
    "agsel-badam": selecting(
        "agsel, BAdam: one layer for 20 steps, the lowest first, which has the longest backward",
        lambda _: agsel.BAdam(every=20, order="ascending"),
    ),
    "agsel-full": selecting("agsel, everything that takes part: all blocks, or the layers from one on", every_block),
    "agsel-lora-256": selecting("the same with adapters (LoRA r=256)", every_block, lora_rank=256),
    "agsel-lora-256-folded": selecting("the same with --fold_adapters", every_block, lora_rank=256, folds=True),
    "agsel-lora-64": selecting("the same with adapters of r=64, not folded", every_block, lora_rank=64),
    "freezeout-lora-256-folded": selecting(
        "agsel, FreezeOut over adapters (LoRA r=256), folded, when so many layers are left to train",
        frozen_below,
        lora_rank=256,
        folds=True,
    ),
    "freezeout-lora-128-folded": selecting(
        "agsel, FreezeOut over adapters (LoRA r=128), folded, when so many layers are left to train",
        frozen_below,
        lora_rank=128,
        folds=True,
    ),
    "exploit-lora-256": selecting(
        "agsel, adapters (LoRA r=256) of a new random set of layers at every step", exploiting, lora_rank=256
    ),
    "exploit-lora-256-folded": selecting("the same with --fold_adapters", exploiting, lora_rank=256, folds=True),
    "exploit-lora-16": selecting("the same over LoRA r=16, not folded", exploiting, lora_rank=16),
    "ist-lora-256": selecting(
        "agsel, IST over LoRA r=256", lambda fraction: agsel.Ist(fraction=fraction), lora_rank=256
    ),
    "elements": selecting(
        "agsel, single weights of every layer: 1 %, if no other density is named",
        every_block,
        elements=True,
    ),
    "exploit-elements": selecting(
        "agsel, single weights, as many, of a new random set of layers at every step", exploiting, elements=True
    ),
    "trainer": Method(
        meaning="`exploit` through launch/train.py and TRL's own fused loss", start=None, policy=exploiting
    ),
    "lora-256": Method(meaning="LoRA r=256 on all linear layers, stock DeepSpeed", start=partial(start_lora, 256)),
    "lora-128": Method(meaning="LoRA r=128 on all linear layers, stock DeepSpeed", start=partial(start_lora, 128)),
    "lora-64": Method(meaning="LoRA r=64 on all linear layers, stock DeepSpeed", start=partial(start_lora, 64)),
    "lora-16": Method(meaning="LoRA r=16 on all linear layers, stock DeepSpeed", start=partial(start_lora, 16)),
    "supertuning": Method(
        meaning="PEFT's Supertuning of as many weights, stock DeepSpeed",
        start=start_supertuning,
        reads_density=True,
    ),
    "shira": Method(
        meaning="PEFT's SHiRA of about as many weights, by whole ranks, stock DeepSpeed",
        start=start_shira,
        reads_density=True,
    ),
    "zero-offload": Method(meaning="full fine-tuning, ZeRO-Offload (CPU Adam)", start=start_zero_offload),
    "badam": Method(
        meaning="the BAdam package, as many layers at a time, no switch while measured",
        start=start_badam,
        fraction_of_stock=True,
    ),
}


def method_of(configuration: Configuration) -> Method:
    """The method that the configuration names.

    Raises:
        UserError: there is none of that name.
    """
    if configuration.method not in METHODS:
        raise UserError(f"unknown method {configuration.method!r} (--methods): use some of {', '.join(METHODS)}")
    return METHODS[configuration.method]


def canonical(configuration: Configuration) -> Configuration:
    """The same configuration without the options its method does not read, so that it is measured once."""
    method = method_of(configuration)
    return replace(
        configuration,
        fraction=configuration.fraction if method.reads_fraction else Configuration.fraction,
        density=configuration.density if method.reads_density else Configuration.density,
        select_from=configuration.select_from if method.moves_states else Configuration.select_from,
        offload_states=configuration.offload_states or not method.moves_states,
    )
