"""What is rehearsed: the batch and the kernels of a run, and what one of its steps trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

Loss = Literal["transformers", "liger", "trl"]


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """What of DeepSpeed's `zero_optimization` section decides about memory, with DeepSpeed's defaults."""

    stage: int
    overlap_comm: bool | None = None
    reduce_bucket_size: float = 5e8
    stage3_prefetch_bucket_size: float = 5e7
    stage3_param_persistence_threshold: float = 1e5
    stage3_max_live_parameters: float = 1e9
    stage3_max_reuse_distance: float = 1e9

    @classmethod
    def of(cls, section: dict[str, Any]) -> ZeroSettings:
        """From the section of a DeepSpeed configuration; what is `"auto"` there is taken as the default."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in section.items() if name in names and value != "auto"})


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every rank does in a step.

    Attributes:
        zero: the ZeRO settings of the DeepSpeed configuration.
        ranks: data-parallel ranks.
        micro_batch: rows per forward.
        sequence: tokens per row.
        accumulation: micro-batches per optimizer step.
        checkpointing: gradient checkpointing, not reentrant.
        padded: rows of different lengths, so that attention needs a mask.
        compiled: decoder layers compiled one by one.
        liger_layers: Liger's kernels inside the layers; needs the package.
        loss: `transformers` makes the logits of all tokens; `liger` and `trl` are their fused losses.
    """

    zero: ZeroSettings
    ranks: int
    micro_batch: int
    sequence: int
    accumulation: int = 1
    checkpointing: bool = False
    padded: bool = False
    compiled: bool = False
    liger_layers: bool = False
    loss: Loss = "trl"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is trained in a step, by index into the optimizer's param groups.

    Attributes:
        groups: the parameters of each param group, as DeepSpeed partitions them.
        trainable: groups that get a gradient; if there are none, the step is a forward alone.
        updated: groups that the optimizer steps; the others' gradients are dropped.
        resident: groups whose optimizer states are on the GPU all the time; those of others that are updated arrive
            after a third of the backward.
        stock: DeepSpeed without agsel, which keeps one gradient buffer for all groups.
        choosing: gradients are added up, layer by layer, for elements to be chosen by, and nothing is updated.
    """

    groups: Sequence[Sequence[nn.Parameter]]
    trainable: frozenset[int]
    updated: frozenset[int]
    resident: frozenset[int]
    stock: bool = False
    choosing: bool = False
