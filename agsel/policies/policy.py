"""The contract of a selection policy: who is updated next, decided alike on every rank.

A policy is plain Python: it knows names, sizes and gradient norms of blocks, nothing of torch.distributed or DeepSpeed.
Every rank runs the same policy on the same all-reduced numbers, so all make the same choice without a broadcast.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np

from agsel.errors import UserError

logger = logging.getLogger("agsel")

StepKind = Literal["explore", "exploit", "probe"]
FRACTION_HELP = (
    "Share of the selectable blocks updated per step, above 0 and at most 1; rounded down, at least one block. Smaller "
    "is faster and lighter, larger is closer to full fine-tuning."
)


def blocks_of_fraction(fraction: float, blocks: int) -> int:
    """k = max(1, int(fraction * blocks)): the paper truncates."""
    rounding_slack = 1e-9  # 0.29 * 100 is 28.999999999999996, and 29 is meant
    return max(1, int(fraction * blocks + rounding_slack))


def fraction_of_blocks(count: int, blocks: int) -> str:
    """A short decimal that `blocks_of_fraction` turns into this count again, which must be 1 or more."""
    digits = max(2, len(str(blocks - 1)))  # one digit less could stand for the next count
    return f"{math.ceil(10**digits * count / blocks) / 10**digits:.{digits}f}"


@dataclass(frozen=True)
class BlockInfo:
    """A block as a policy knows it.

    Attributes:
        name: `embed`, `layers.0`, ..., `final_norm`, `head`.
        numel: elements of its trainable parameters, on all ranks together.
    """

    name: str
    numel: int

    @property
    def is_layer(self) -> bool:
        """Whether it is a decoder layer."""
        return self.name.startswith("layers.")


@dataclass(frozen=True)
class Update:
    """What an optimizer step does.

    Attributes:
        blocks: indices of the blocks that are updated; none in a step that only measures.
        fresh: those of them whose Adam moments and step count start anew.
    """

    blocks: frozenset[int]
    fresh: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plan:
    """What a step needs to know before its forward.

    Attributes:
        trainable: indices of the blocks that need a gradient.
        update: what the step will do; None if that is decided after the backward, by the norms.
        chosen_early: whether norms have decided it, those of the step's first micro-batch.
    """

    trainable: frozenset[int]
    update: Update | None
    chosen_early: bool = False

    @classmethod
    def of(cls, blocks: Iterable[int], fresh: Iterable[int] = ()) -> Plan:
        """Update these blocks; no other needs a gradient."""
        chosen = frozenset(blocks)
        return cls(chosen, Update(chosen, frozenset(fresh)))

    @property
    def kind(self) -> StepKind:
        """`explore`: decided by norms; `exploit`: known before the forward; `probe`: updates nothing."""
        if self.update is None or self.chosen_early:
            return "explore"
        return "exploit" if self.update.blocks else "probe"


@dataclass(frozen=True)
class Probe:
    """A forward without gradient on the first rows of a step's batch, dropout off.

    Attributes:
        suppressed: indices of the decoder layers whose adapters are scaled meanwhile.
        factor: by which.
        rows: how many, on all ranks together; at least one on each.
    """

    suppressed: frozenset[int]
    factor: float
    rows: int


def setting(
    default: Any = dataclasses.MISSING, *, help: str, flag: str | None = None, follows: str | None = None
) -> Any:
    """A dataclass field of a policy that is a setting of the command line, too.

    Args:
        default: of the field; required without.
        help: for `--help`.
        flag: its name there, if it is not the field's own.
        follows: the setting of the run that it takes its value from there, unless it is given.
    """
    return dataclasses.field(default=default, metadata={"help": help, "flag": flag, "follows": follows})


def flags_of(policy: type[Policy]) -> dict[str, dataclasses.Field[Any]]:
    """The settings that a policy reads: its dataclass fields by their names on the command line."""
    if not dataclasses.is_dataclass(policy):
        return {}
    return {field.metadata.get("flag") or field.name: field for field in dataclasses.fields(policy) if field.init}


def reads_fraction(policy: Policy | type[Policy]) -> bool:
    """Whether `--select_fraction` says how many blocks a step updates."""
    return "select_fraction" in flags_of(policy if isinstance(policy, type) else type(policy))


def largest(values: Mapping[int, float], count: int) -> frozenset[int]:
    """Indices of the `count` largest values; ties go to the earlier block."""
    return frozenset(sorted(values, key=lambda block: (-values[block], block))[:count])


def drawn(log_weights: np.ndarray, count: int, generator: np.random.Generator) -> frozenset[int]:
    """Indices drawn one after another without replacement, each by its weight: the Gumbel-top-k trick.

    Args:
        log_weights: logarithms of what the probabilities are proportional to.
        count: how many.
        generator: the policy's own.
    """
    perturbed = log_weights + generator.gumbel(size=len(log_weights))
    return frozenset(np.argsort(-perturbed, kind="stable")[:count].tolist())


class Policy(ABC):
    """Decides which blocks each optimizer step updates. Subclasses are dataclasses of their settings.

    One step is `plan()` before the forward and `commit(norms)` after the backward. `plan` may be called again before
    `commit` and returns the same plan, so a step that is skipped (non-finite gradient) is simply tried again. A rule of
    its own writes `make_plan`, and `choose` if it looks at norms; `probes` and `observe`, if it wants losses first.

    Attributes:
        method: name on the command line.
        rule: what it does, in a phrase for `--help`.
        takes_part: which blocks it selects from by default, the decoder layers or all.
        keeps_moments: whether a block's Adam moments outlive the steps that update it; else they are dropped.
        needs_adapters: whether the blocks must be adapters, because it scales them.
        spread_by: what gives more blocks a turn, where some were never updated.
        blocks: that take part, in forward order; set by `start`.
        counts: how often each was updated.
        step: optimizer steps applied.
    """

    method: ClassVar[str] = ""
    rule: ClassVar[str] = ""
    takes_part: ClassVar[Literal["layers", "all"]] = "layers"
    keeps_moments: ClassVar[bool] = True
    needs_adapters: ClassVar[bool] = False
    spread_by: ClassVar[str] = "train for more steps"
    seed: int = 0

    @classmethod
    def scope(cls, select_from: float) -> Literal["layers", "all"]:
        """What it selects from where nobody says: `takes_part`.

        Args:
            select_from: the lowest layer that takes part, as in `agsel.block_param_groups`.
        """
        return cls.takes_part

    def complete(self, epoch_steps: int, run_steps: int) -> None:  # noqa: B027 - most rules leave nothing open
        """Fill in the settings that were left open, given the optimizer steps of an epoch and of the whole run."""

    def remark(self, run_steps: int) -> str | None:
        """What people should know of a run of so many optimizer steps, after `start`; None for nothing."""
        return None

    def start(self, blocks: Sequence[BlockInfo]) -> None:
        """Begin a run over these blocks, forgetting any earlier one.

        Raises:
            UserError: a setting was left open, or does not fit these blocks.
        """
        self.blocks = tuple(blocks)
        self.counts = [0] * len(blocks)
        self.step = 0
        self._generator = np.random.default_rng(self.seed)
        self._plan: Plan | None = None

    def started(self, blocks: Sequence[BlockInfo]) -> Self:
        """A copy that has begun a run over these blocks; this policy stays as it is."""
        twin = copy.copy(self)
        twin.start(blocks)
        return twin

    @property
    def number_of_blocks(self) -> int:
        """How many blocks there are to select from."""
        return len(self.blocks)

    @property
    def blocks_per_step(self) -> int:
        """How many blocks a step updates, at most."""
        return self.number_of_blocks

    @property
    def kinds_of_steps(self) -> tuple[StepKind, ...]:
        """The kinds of steps that a run does; known before `start`."""
        return ("exploit",)

    @property
    def pinned(self) -> frozenset[int]:
        """Indices of the blocks whose optimizer states never leave the device, the same for a whole run."""
        return frozenset()

    @property
    def epsilon(self) -> float | None:
        """Probability that the current step explores; None where the rule has no such thing."""
        return None

    @classmethod
    def asks_for_losses(cls) -> bool:
        """Whether some steps want `probes`."""
        return cls.probes is not Policy.probes

    def probes(self) -> tuple[Probe, ...]:
        """The forwards that the current step wants before it is planned; `observe` gets their losses."""
        return ()

    def observe(self, losses: Sequence[float]) -> None:
        """The losses of `probes()`, averaged over the ranks."""
        raise NotImplementedError(f"{type(self).__name__} asks for probes but does not look at their losses")

    @property
    def is_planned(self) -> bool:
        """Whether the current step has its plan."""
        return self._plan is not None

    def plan(self) -> Plan:
        """The plan of the current step.

        Raises:
            UserError: the rule has drawn blocks that are not there, or none.
        """
        if self._plan is None:
            plan = self.make_plan()
            self._require_blocks("planned", plan.trainable, range(self.number_of_blocks))
            if not plan.trainable:
                raise UserError(f"{type(self).__name__} planned no block at step {self.step + 1}: name at least one")
            if plan.update is not None:
                self._require_update(plan.update, plan)
            self._plan = plan
        return self._plan

    def choose_early(self, norms: Mapping[int, float]) -> Plan:
        """Let norms of a part of the step's rows decide what it does. Returns the plan for the others.

        Args:
            norms: the global gradient norm of every trainable block by its index.

        Raises:
            UserError: the rule has chosen blocks that have no gradient.
        """
        update = self.choose(norms)
        self._require_update(update, self.plan())
        self._plan = Plan(update.blocks, update, chosen_early=True)
        return self._plan

    def commit(self, norms: Mapping[int, float]) -> Update:
        """End the current step, and return what it does.

        Args:
            norms: the global gradient norm of every trainable block by its index.

        Raises:
            UserError: the rule has chosen blocks that have no gradient.
        """
        plan = self.plan()
        update = plan.update if plan.update and plan.chosen_early else self.choose(norms)
        self._require_update(update, plan)
        for block in update.blocks:
            self.counts[block] += 1
        self.step += 1
        self._plan = None
        return update

    @abstractmethod
    def make_plan(self) -> Plan:
        """The plan of the current step. Called once for a step."""

    def choose(self, norms: Mapping[int, float]) -> Update:
        """What the current step does, now that its norms are known. Called once for a step that is applied."""
        update = self.plan().update
        if update is None:
            raise NotImplementedError(f"{type(self).__name__} leaves the choice to its norms but has no rule for it")
        return update

    def explore_all(self) -> Plan:
        """Every block gets a gradient, and `choose` decides."""
        return Plan(frozenset(range(self.number_of_blocks)), None)

    def settings(self) -> dict[str, Any]:
        """Name and settings of the policy: what must be equal on all ranks."""
        return {"method": type(self).__name__} | dataclasses.asdict(self)  # type: ignore[call-overload]

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on, as plain Python values."""
        return {
            "settings": self.settings(),
            "counts": list(self.counts),
            "step": self.step,
            "generator": self._generator.bit_generator.state,
            "plan": _state_of_plan(self._plan) if self._plan else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Settings that have changed since are named in a warning.

        Raises:
            UserError: the state is of another method or another number of blocks.
        """
        self._compare_settings(state["settings"])
        if len(state["counts"]) != self.number_of_blocks:
            raise UserError(
                f"the saved selection is over {len(state['counts'])} blocks, this run has {self.number_of_blocks}: "
                "use the model and the blocks setting (--select_blocks) of the saved run"
            )
        self.counts = list(state["counts"])
        self.step = state["step"]
        self._generator.bit_generator.state = state["generator"]
        self._plan = _plan_of_state(state["plan"]) if state["plan"] else None

    def _compare_settings(self, saved: dict[str, Any]) -> None:
        current = self.settings()
        if saved["method"] != current["method"]:
            raise UserError(
                f"the saved selection is of {saved['method']}, this run's of {current['method']}: use the method "
                "(--method) of the saved run"
            )
        changed = [
            f"{name} {saved.get(name)} -> {value}" for name, value in current.items() if saved.get(name) != value
        ]
        if changed:
            logger.warning("the selection continues with changed settings: %s", ", ".join(changed))

    def _require_update(self, update: Update, plan: Plan) -> None:
        self._require_blocks("updates", update.blocks, plan.trainable)
        self._require_blocks("starts anew", update.fresh, update.blocks)

    def _require_blocks(self, verb: str, chosen: Collection[int], allowed: Collection[int]) -> None:
        wrong = sorted(set(chosen) - set(allowed))
        if wrong:
            raise UserError(
                f"{type(self).__name__} {verb} block {wrong[0]} at step {self.step + 1}, which is not one of "
                f"{len(allowed)} that it may: correct its rule"
            )


def _state_of_plan(plan: Plan) -> dict[str, Any]:
    """As plain Python values; `updated` and `fresh` only where they tell something."""
    state: dict[str, Any] = {"explore": plan.update is None, "blocks": sorted(plan.trainable)}
    if plan.update is not None and plan.update.blocks != plan.trainable:
        state["updated"] = sorted(plan.update.blocks)
    if plan.update is not None and plan.update.fresh:
        state["fresh"] = sorted(plan.update.fresh)
    if plan.chosen_early:
        state["chosen_early"] = True
    return state


def _plan_of_state(state: dict[str, Any]) -> Plan:
    trainable = frozenset(state["blocks"])
    if state["explore"]:
        return Plan(trainable, None)
    update = Update(frozenset(state.get("updated", trainable)), frozenset(state.get("fresh", ())))
    return Plan(trainable, update, state.get("chosen_early", False))


@dataclass(kw_only=True)
class FractionPolicy(Policy):
    """A policy that updates the same number of blocks at every step.

    Attributes:
        fraction: share of the blocks to update, in (0, 1].
        seed: of the run's one generator.
    """

    spread_by = "raise --select_fraction"

    fraction: float = setting(
        0.3,
        flag="select_fraction",
        help=FRACTION_HELP,
    )
    seed: int = setting(
        0,
        flag="selection_seed",
        follows="seed",
        help="Seed of the selection's own random generator. Default: `--seed`.",
    )

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be in (0, 1], got {self.fraction} (--select_fraction)")
        if self.seed < 0:
            raise UserError(f"seed must be 0 or more, got {self.seed} (--selection_seed)")

    @property
    def blocks_per_step(self) -> int:
        """k, the `blocks_of_fraction`."""
        return blocks_of_fraction(self.fraction, self.number_of_blocks)

    def choose(self, norms: Mapping[int, float]) -> Update:
        """What was planned; on a step that explores, the k blocks with the largest norms."""
        return self.plan().update or Update(self.largest(norms))

    def largest(self, values: Mapping[int, float]) -> frozenset[int]:
        """Indices of the `blocks_per_step` largest values; ties go to the earlier block."""
        return largest(values, self.blocks_per_step)
