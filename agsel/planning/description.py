"""A memory plan in words."""

from agsel.planning.memory import MemoryPlan

NAMES = {"losses": "forward for losses", "full": "full fine-tuning"}
PARTS = ("weights", "states", "gradients", "buffers", "activations", "loss")


def describe_memory(plan: MemoryPlan) -> str:
    """A few lines on what a run needs, at most, with GB for 10^9 bytes."""
    rows = [
        (NAMES.get(kind, kind), peak.total, [peak.parts.get(part, 0) for part in PARTS])
        for kind, peak in plan.steps.items()
    ]
    lines = []
    if rows:
        lines = [f"memory    {'GB on each GPU, at most':24} {'all':>6}" + "".join(f"{part:>12}" for part in PARTS)]
        for name, total, parts in [*rows, ("while starting", plan.starting, [])]:
            lines.append(f"          {name:24} {total / 1e9:6.2f}" + "".join(f"{part / 1e9:12.2f}" for part in parts))
    return "\n".join([*lines, f"host      {_describe_host(plan)}"])


def _describe_host(plan: MemoryPlan) -> str:
    if not plan.host:
        return "no optimizer states"
    needed = f"{plan.host / 1e9:.2f} GB per rank, {plan.host_needed / 1e9:.2f} GB per host for optimizer states"
    if not plan.steps:
        return needed
    return (
        f"{needed}; {plan.moved / 1e9:.2f} GB in and out per step take {1000 * plan.copy_seconds:.1f} ms, beside "
        f"at least {1000 * plan.compute_seconds:.1f} ms of arithmetic"
    )
