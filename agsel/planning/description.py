"""A memory plan in words."""

from collections.abc import Sequence

from agsel.planning.duration import Speeds
from agsel.planning.forecast import LEAST_SHARE, MOST_RANKS, Forecast
from agsel.planning.memory import MemoryPlan, PlannedStep
from agsel.planning.traffic import Cluster

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


def describe_forecast(
    forecast: Forecast, kinds: Sequence[PlannedStep], cluster: Cluster, speeds: Speeds, gpu_gb: float
) -> str:
    """What the steps send and how long they take, and where more GPUs stop paying; GB are 10^9 bytes."""
    steps = {NAMES.get(kind, kind): forecast.step(kind, cluster) for kind in kinds}
    lines = [_row("traffic", "GB per step from each GPU", "NVLink", "ms", "network", "ms", "host", "ms")]
    for name, step in steps.items():
        pairs = ((step.sent.link, speeds.link), (step.sent.network, speeds.network), (step.moved, speeds.host))
        numbers = [number for nbytes, speed in pairs for number in (nbytes / 1e9, 1000 * nbytes / speed)]
        lines.append(_row("", name, *(f"{number:.2f}" for number in numbers)))
    head = ("all", "forward", "backward", "update", "GPU", "Python", "sending", "exposed", "states")
    lines.append(_row("time", "predicted ms per step", *head))
    for name, step in steps.items():
        time = step.time
        phases = (time.forward, time.backward, time.step)
        totals = [sum(getattr(phase, part) for phase in phases) for part in ("gpu", "python", "sending")]
        seconds = [time.total, *(phase.total for phase in phases), *totals, time.exposed, time.waiting]
        lines.append(_row("", name, *(f"{1000 * number:.1f}" for number in seconds)))
    return "\n".join([*lines, *_describe_hiding(), *_describe_reach(forecast, cluster, gpu_gb)])


def _row(label: str, name: str, *cells: str) -> str:
    return f"{label:9} {name:25}" + "".join(f"{cell:>9}" for cell in cells)


def _describe_hiding() -> list[str]:
    return [
        "hides     sending: behind GPU and Python in forward and backward, but for one collective of each",
        "          states from the host and to it: behind forward and backward; exploring, behind 2/3 of the backward",
        "          in the update nothing. exposed, states: ms of waiting for the one and the other",
    ]


def _describe_reach(forecast: Forecast, cluster: Cluster, gpu_gb: float) -> list[str]:
    if cluster.ranks == 1:
        return []
    most = forecast.pays_up_to(cluster.ranks_per_host)
    saving = f"{forecast.saving(cluster):.0%} of the time of full fine-tuning, at least {LEAST_SHARE:.0%}"
    reach = f"on any number of GPUs to {MOST_RANKS}" if most is None else f"on up to {most} GPUs"
    small = forecast.states_small_from(1e9 * gpu_gb)
    return [
        f"saves     {saving} {reach} with this batch on each",
        f"states    of all blocks take less than {LEAST_SHARE:.0%} of each of {small} or more GPUs: --no-offload there",
    ]
