"""The selection in numbers: who was chosen, how evenly, and by which gradient norms; and how numbers are grouped."""

import math
from collections.abc import Collection, Mapping
from typing import Any

NORM = "block_norm/"
"""Before the name of a block: its gradient norm."""
LAYOUT: dict[str, dict[str, Any]] = {
    "train": {
        "loss": ["Multiline", ["train/loss", "eval/loss"]],
        "learning rate": ["Multiline", ["train/learning_rate"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
    },
    "eval": {"results of tasks": ["Multiline", ["eval/.*_accuracy"]], "loss": ["Multiline", ["eval/loss"]]},
    "speed": {
        "tokens per second": ["Multiline", ["speed/tokens_per_second"]],
        "milliseconds per step": ["Multiline", ["speed/ms_per_step", "speed/data_ms", "speed/exposed_ms"]],
        "model FLOPs utilisation": ["Multiline", ["speed/mfu"]],
    },
    "memory": {
        "GB": ["Multiline", ["memory/peak_gb", "memory/host_gb"]],
        "GB moved per step": ["Multiline", ["memory/moved_gb_per_step"]],
    },
    "selection": {
        "exploring": ["Multiline", ["selection/explored", "selection/epsilon"]],
        "entropy of the counts": ["Multiline", ["selection/entropy"]],
        "blocks": ["Multiline", ["selection/blocks", "selection/lowest_block"]],
        "gradient norms of blocks": ["Multiline", [f"{NORM}.*"]],
    },
}
"""For TensorBoard's page of custom scalars: groups in the order in which people read them."""


def tag_of(name: str) -> str:
    """In TensorBoard, of a number that a Trainer logs: agsel's names have a group of their own."""
    if "/" in name:
        return name
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def selection_scalars(
    counts: Mapping[str, int],
    selected: Collection[str],
    norms: Mapping[str, float],
    explored: float,
    skipped: int,
    epsilon: float | None = None,
) -> dict[str, float]:
    """Numbers by the names under which they are logged.

    Args:
        counts: how often each block was updated, in forward order.
        selected: names of the blocks that the last step updated; empty if it was skipped.
        norms: global gradient norm of each block that had a gradient in the last step.
        explored: share of the steps since the last report that explored.
        skipped: steps of the run, as far as they are known, that updated nothing, as a gradient was not finite.
        epsilon: probability of exploring, for policies that have one.
    """
    scalars = {
        "selection/blocks": float(len(selected)),
        "selection/explored": explored,
        "selection/entropy": normalised_entropy(counts.values()),
        "selection/skipped_steps": float(skipped),
    }
    if epsilon is not None:
        scalars["selection/epsilon"] = epsilon
    if selected:
        scalars["selection/lowest_block"] = float(min(list(counts).index(name) for name in selected))
    return scalars | {f"{NORM}{name}": norm for name, norm in norms.items() if math.isfinite(norm)}


def normalised_entropy(counts: Collection[int]) -> float:
    """Entropy of the counts over that of a uniform choice: 1 if all blocks were chosen equally often, 0 if one was.

    1 as well where there is nothing to compare: a single block, or no choice yet.
    """
    total = sum(counts)
    if len(counts) < 2 or total == 0:
        return 1.0
    shares = [count / total for count in counts if count]
    return -sum(share * math.log(share) for share in shares) / math.log(len(counts))
