"""The selection as TensorBoard scalars: who was chosen, how evenly, and by which gradient norms."""

import math
from collections.abc import Collection, Mapping


def selection_scalars(
    counts: Mapping[str, int],
    selected: Collection[str],
    norms: Mapping[str, float],
    explored: float,
    epsilon: float | None = None,
) -> dict[str, float]:
    """Tag -> value, for `SummaryWriter.add_scalar`.

    Args:
        counts: how often each block was updated, in forward order.
        selected: names of the blocks that the last step updated; empty if it was skipped.
        norms: global gradient norm of each block that had a gradient in the last step.
        explored: share of the steps since the last report that explored.
        epsilon: probability of exploring, for policies that have one.
    """
    scalars = {
        "selection/blocks": float(len(selected)),
        "selection/explored": explored,
        "selection/entropy": normalised_entropy(counts.values()),
    }
    if epsilon is not None:
        scalars["selection/epsilon"] = epsilon
    if selected:
        scalars["selection/lowest_block"] = float(min(list(counts).index(name) for name in selected))
    scalars |= {f"block_count/{name}": float(count) for name, count in counts.items()}
    return scalars | {f"block_norm/{name}": norm for name, norm in norms.items() if math.isfinite(norm)}


def normalised_entropy(counts: Collection[int]) -> float:
    """Entropy of the counts over that of a uniform choice: 1 if all blocks were chosen equally often, 0 if one was.

    1 as well where there is nothing to compare: a single block, or no choice yet.
    """
    total = sum(counts)
    if len(counts) < 2 or total == 0:
        return 1.0
    shares = [count / total for count in counts if count]
    return -sum(share * math.log(share) for share in shares) / math.log(len(counts))
