"""The status line of a training run: one readable line per logging step."""

import re
from collections.abc import Iterable, Mapping
from datetime import timedelta

SHOWN = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "eval_loss": "eval loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "norm {:.3g}",
    "speed/tokens_per_second": "{:,.0f} tok/s",
    "speed/mfu": "MFU {:.0%}",
    "memory/peak_gb": "peak {:.1f} GB",
}
OF_TASKS = {"loss": "{} loss {:.4f}", "nll": "{} nll {:.4f}", "accuracy": "{} accuracy {:.1%}"}
"""By the end of a name such as `eval_gsm8k_nll`; losses where a Trainer evaluates on several datasets."""


def status_line(
    step: int, steps: int, numbers: Mapping[str, float], choice: str = "", times: tuple[float, float] | None = None
) -> str:
    """For example `step  10/200  epoch 0.40  loss 1.4321  lr 4.00e-04  explore  layers 3,7-9  0:00:21, 0:06:40 left`.

    Args:
        step: optimizer steps done.
        steps: optimizer steps of the whole run.
        numbers: what a Trainer logs; the names in `SHOWN` are shown, in its order, and results of tasks.
        choice: what the selection did.
        times: seconds that have passed, and that are left.
    """
    shown = [text.format(numbers[name]) for name, text in SHOWN.items() if name in numbers]
    shown += [OF_TASKS[what].format(task, value) for (task, what), value in _results_of_tasks(numbers).items()]
    clock = "" if times is None else f"{duration(times[0])}, {duration(times[1])} left"
    return "  ".join([f"step {step:>{len(str(steps))}}/{steps}", *shown, *filter(None, [choice, clock])])


def duration(seconds: float) -> str:
    """For example `1:02:03`."""
    return str(timedelta(seconds=round(seconds)))


def has_results_of_tasks(numbers: Mapping[str, float]) -> bool:
    """Whether some of them are shown."""
    return bool(_results_of_tasks(numbers))


def _results_of_tasks(numbers: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """By task and what was measured."""
    pattern = re.compile(rf"eval_(?!mean_token_)(\w+)(?<!_mean_token)_({'|'.join(OF_TASKS)})")
    found = ((pattern.fullmatch(name), value) for name, value in numbers.items())
    return {(match[1], match[2]): value for match, value in found if match}


def block_ranges(names: Iterable[str]) -> str:
    """Block names, the layers in ranges: `embed layers 3,7-9`.

    Args:
        names: names of blocks in forward order.
    """
    names = list(names)
    layers = [int(name.removeprefix("layers.")) for name in names if name.startswith("layers.")]
    first_of_ranges = [layer for layer in layers if layer - 1 not in layers]
    last_of_ranges = [layer for layer in layers if layer + 1 not in layers]
    ranges = [
        str(first) if first == last else f"{first}-{last}"
        for first, last in zip(first_of_ranges, last_of_ranges, strict=True)
    ]
    before = [name for name in names if name == "embed"]
    after = [name for name in names if name not in before and not name.startswith("layers.")]
    return " ".join([*before, *([f"layers {','.join(ranges)}"] if ranges else []), *after])


LEVELS = "▁▂▃▄▅▆▇█"


def count_levels(counts: Mapping[str, int]) -> str:
    """How often each block was trained as a row of bars, for example `layers 0-5 ▁▁█▄▁▂, 0 to 118 times each`."""
    most = max(counts.values())
    bars = "".join(LEVELS[-(-count * (len(LEVELS) - 1) // most) if most else 0] for count in counts.values())
    return f"{block_ranges(counts)} {bars}, {min(counts.values()):,} to {most:,} times each"
