"""Memory of a run before it starts: what each kind of step needs on a GPU and on the host, and what does not fit.

The numbers come from rehearsing the steps (`agsel.planning.rehearsal`), not from formulas for one architecture.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from agsel.adapters import fuse_adapters
from agsel.blocks import Block, decoder_layers, find_blocks, taking_part
from agsel.elements import ElementMask, element_layers, mask_of
from agsel.elements.choosing import linear_weights
from agsel.elements.layer import add_values
from agsel.planning.rehearsal import CannotRehearseError, Peak, Rehearsal, Step, Trace, Workload, running_model
from agsel.policies import BlockInfo, Policy, StepKind
from agsel.zero.parameters import block_infos, global_numel
from agsel.zero.timetable import early

PlannedStep = StepKind | Literal["losses", "full"]
"""A step of a policy, the forwards that it asks for before one, or a step of full fine-tuning by stock DeepSpeed."""
STATE_BYTES, MASTER_BYTES = 12, 4
"""Per parameter: fp32 master weight and two Adam moments, and the master alone."""
CONTEXT_BYTES = 2e9
FRAGMENTATION = 1.05
"""Beyond what PyTorch allocates: CUDA context and NCCL, and the allocator's gaps."""
COPY_SPEED = 50e9
"""Bytes per second each way between a GPU and page-locked host memory (PCIe 5)."""
ARITHMETIC_SPEED = 0.5 * 989e12
"""Floating point operations per second: half the dense bf16 peak of H100 and H200."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs. Bytes, per rank unless said otherwise.

    Attributes:
        steps: fullest moment of each kind of step that the run does, and of full fine-tuning by stock DeepSpeed.
        starting: peak while engine and optimizer are built.
        host: optimizer states in host memory.
        ranks_per_host: that share the host.
        moved: optimizer states that a step fetches, at most; it evicts as many.
    """

    steps: dict[PlannedStep, Peak]
    starting: int
    host: int
    ranks_per_host: int
    moved: int

    @property
    def gpu_needed(self) -> float:
        """Memory a GPU must have: the peak of the run, and what lies outside PyTorch's count."""
        return on_gpu(max([self.starting, *(peak.total for kind, peak in self.steps.items() if kind != "full")]))

    @property
    def host_needed(self) -> int:
        """Memory a host must have for the optimizer states of all its ranks."""
        return self.host * self.ranks_per_host

    @property
    def copy_seconds(self) -> float:
        """Time a step's copies take, both ways at once, at the least.

        They run beside the step's arithmetic and slow it down: shorter than it is not free.
        """
        return self.moved / COPY_SPEED

    @property
    def compute_seconds(self) -> float:
        """Time forward and backward take at least: their matrix products at half the peak of an H100 or H200."""
        return min(peak.flops for kind, peak in self.steps.items() if kind in get_args(StepKind)) / ARITHMETIC_SPEED


class Planner:
    """Plans for one model and workload; how many blocks are updated per step may vary.

    Args:
        model: from `meta_model` or `meta_copy`, and nobody else's.
        workload: batch, kernels, ZeRO settings.
        blocks: which blocks take part.
        select_from: the lowest layer that does, as in `agsel.block_param_groups`.
        offload_states: keep the optimizer states of blocks that are not selected in host memory.
        policy: of the run, for what it pins to the device and what it drops; None for one that does neither.
        ranks_per_host: that share the host's memory; all by default.
        fold_adapters: as of `agsel.attach`.

    Raises:
        UserError: the model's blocks cannot be found.
    """

    def __init__(
        self,
        model: nn.Module,
        workload: Workload,
        *,
        blocks: Literal["layers", "all"] = "layers",
        select_from: float = 0,
        offload_states: bool = True,
        policy: Policy | None = None,
        ranks_per_host: int | None = None,
        fold_adapters: bool = False,
    ) -> None:
        fuse_adapters(decoder_layers(model), fold=fold_adapters)
        self._blocks = [b for b in taking_part(find_blocks(model), blocks, select_from) if b.trainable]
        self._groups = [block.trainable for block in self._blocks]
        self._everything = frozenset(range(len(self._blocks)))
        self._trained_in_full = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        self._itemsize = self._groups[0][0].itemsize
        self._workload = workload
        self._offload = offload_states
        self._keeps_moments = policy is None or policy.keeps_moments
        self._pinned = policy.started(self.infos).pinned if policy else frozenset[int]()
        self._ranks_per_host = ranks_per_host or workload.ranks
        self._rehearsal = Rehearsal(model, workload)
        self._peak = cache(self._heaviest)

    @property
    def infos(self) -> list[BlockInfo]:
        """The blocks that take part, as a policy knows them."""
        return block_infos(self._blocks)

    @property
    def number_of_blocks(self) -> int:
        """Blocks that take part."""
        return len(self._blocks)

    def plan(self, blocks_per_step: int, kinds: Sequence[PlannedStep]) -> MemoryPlan:
        """The plan of a run with these kinds of steps."""
        return MemoryPlan(
            steps={kind: self._peak(kind, blocks_per_step) for kind in kinds},
            starting=self._starting(),
            host=self._travelling(range(self.number_of_blocks)) if self._offload else 0,
            ranks_per_host=self._ranks_per_host,
            moved=self._travelling(heaviest(self._blocks, blocks_per_step)) if self._offload else 0,
        )

    def trace(self, kind: PlannedStep, blocks_per_step: int) -> Trace:
        """What a step computes and sends if the backward goes as deep as on average; `plan` has the deepest."""
        if kind == "full":
            return self._peak(kind, blocks_per_step).trace
        layers = [index for index, block in enumerate(self._blocks) if block.is_layer]
        others = [index for index, block in enumerate(self._blocks) if not block.is_layer]
        of_layers = round(blocks_per_step * len(layers) / self.number_of_blocks)
        spread = {layers[index] for index in spread_evenly(len(layers), of_layers)}
        return self._rehearse(kind, frozenset(spread | set(others[: blocks_per_step - of_layers]))).trace

    def moved_by_new_choice(self, blocks_per_step: int) -> float:
        """Bytes of optimizer states that a rank fetches on average if every step draws its blocks anew."""
        kept = blocks_per_step / self.number_of_blocks
        everything = self._travelling(range(self.number_of_blocks)) if self._offload else 0
        return kept * (1 - kept) * everything

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return self._workload.ranks

    @property
    def states(self) -> int:
        """Bytes of the optimizer states of all blocks that take part, on one rank."""
        return self._states(self._everything)

    def most_blocks(self, gpu_bytes: float, kinds: Sequence[PlannedStep]) -> int:
        """The largest number of blocks per step that fits a GPU; 0 if not even one does."""

        def fits(count: int) -> bool:
            peaks = itertools.chain([self._starting()], (self._peak(kind, count).total for kind in reversed(kinds)))
            return all(on_gpu(peak) <= gpu_bytes for peak in peaks)

        low, high = 0, self.number_of_blocks + 1
        guess = self.number_of_blocks  # most often all fit
        while high - low > 1:
            low, high = (guess, high) if fits(guess) else (low, guess)
            guess = (low + high) // 2
        return low

    def _heaviest(self, kind: PlannedStep, count: int) -> Peak:
        return self._rehearse(kind, heaviest(self._blocks, count))

    def _rehearse(self, kind: PlannedStep, chosen: frozenset[int]) -> Peak:
        nothing = frozenset[int]()
        if kind == "full":
            all_in_one = frozenset({0})
            whole = [self._trained_in_full]
            return self._rehearsal.run(
                Step(groups=whole, trainable=all_in_one, updated=all_in_one, resident=all_in_one, stock=True)
            )
        chosen = chosen if kind != "probe" else nothing
        if kind == "losses":  # of at most a micro-batch; nothing moves before the step is planned
            return self._rehearse_policy(trainable=nothing, updated=nothing, resident=chosen)
        movable = sorted(chosen - self._pinned, key=lambda index: (-self._on_rank(index), index))
        known = frozenset(early(movable) if self._keeps_moments else movable) if kind == "exploit" else nothing
        trainable = chosen if kind == "exploit" else self._everything
        return self._rehearse_policy(trainable=trainable, updated=chosen, resident=known)

    def _rehearse_policy(self, *, trainable: frozenset[int], updated: frozenset[int], resident: frozenset[int]) -> Peak:
        return self._rehearsal.run(
            Step(
                groups=self._groups,
                trainable=trainable,
                updated=updated,
                resident=resident | self._pinned if self._offload else self._everything,
            )
        )

    def _states(self, groups: Iterable[int]) -> int:
        return sum(STATE_BYTES * self._on_rank(group) for group in groups)

    def _travelling(self, groups: Iterable[int]) -> int:
        """Of the groups' states, what is in host memory while they are not selected."""
        nbytes = STATE_BYTES if self._keeps_moments else MASTER_BYTES
        return sum(nbytes * self._on_rank(group) for group in groups if group not in self._pinned)

    def _on_rank(self, group: int) -> int:
        return -(-global_numel(self._groups[group]) // self._workload.ranks)

    def _starting(self) -> int:
        """Peak of engine and optimizer: one group's weights are flattened at a time, then fp32 masters are made.

        At stage 3 the model is taken to be made in slices, as Hugging Face does; there is a flat 16-bit gradient.
        """
        taking_part = sum(map(self._on_rank, range(self.number_of_blocks)))
        states = self._states(self._pinned if self._offload else range(self.number_of_blocks))
        if self._workload.zero.stage == 3:
            slices = self._weights // self._workload.ranks
            return slices + max((4 + self._itemsize) * taking_part, slices, states)
        return self._weights + max(4 * taking_part + self._itemsize * max(map(global_numel, self._groups)), states)


def planned_steps(policy: Policy) -> tuple[PlannedStep, ...]:
    """The kinds of steps that a run does, with the forwards before them that its policy asks for."""
    return (*policy.kinds_of_steps, "losses") if policy.asks_for_losses() else policy.kinds_of_steps


def on_gpu(peak: int) -> float:
    """Memory a GPU must have for a peak that PyTorch counts."""
    return peak * FRAGMENTATION + CONTEXT_BYTES


def heaviest(blocks: Sequence[Block], count: int) -> frozenset[int]:
    """The choice of blocks that needs most memory: embedding and head, first and last layer, layers in between.

    With the first layer trained, the activations of all others are kept. With the last one trained, gradients come, and
    buckets for them, while all activations are still there.
    """
    layers = [index for index, block in enumerate(blocks) if block.is_layer]
    others = sorted(set(range(len(blocks))) - set(layers), key=lambda index: -global_numel(blocks[index].parameters))
    spread = spread_evenly(len(layers), max(0, count - len(others)))
    if spread:
        spread[-1], spread[0] = len(layers) - 1, 0
    return frozenset(others[:count]) | {layers[index] for index in spread}


def spread_evenly(total: int, count: int) -> list[int]:
    """The expected order statistics of `count` indices drawn at random from `total`."""
    return [round((i + 1) * (total + 1) / (count + 1)) - 1 for i in range(count)]


def meta_model(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model without weights from its configuration."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def train_elements(model: nn.Module, density: float) -> None:
    """Train a share of the single weights of a model without weights; which ones makes no difference to memory."""
    weights = {name: weight for layer in linear_weights(model, None) for name, weight in layer.items()}
    counts = {name: max(1, round(density * weight.numel())) for name, weight in weights.items()}
    first = {name: torch.arange(count, dtype=torch.int32) for name, count in counts.items()}
    add_values(model, ElementMask(first, {name: tuple(weight.shape) for name, weight in weights.items()}))


def meta_copy(model: Any, dtype: torch.dtype) -> nn.Module:
    """The same model without weights, with its PEFT adapters or trained elements. ZeRO-3 may have partitioned it.

    Raises:
        CannotRehearseError: the model is quantised, or cannot be made without values.
    """
    adapter = next(iter(getattr(model, "peft_config", {}).values()), None)
    base = model.get_base_model() if adapter is not None else model
    if getattr(base, "is_quantized", False):
        raise CannotRehearseError("its weights are quantised")
    config = copy.deepcopy(base.config)
    if config._attn_implementation != "eager":
        config._attn_implementation = None  # PyTorch's own kernels need as much memory as others, but no GPU
    with torch.device("meta"), running_model():
        twin = type(base)(config).to(dtype)
        if adapter is not None:
            from peft import get_peft_model

            twin = get_peft_model(twin, copy.deepcopy(adapter)).to(dtype)
    if element_layers(model):
        add_values(twin, mask_of(model))
    return twin
