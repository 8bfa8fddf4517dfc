"""How long `agsel.choose_elements` takes, against training forwards and backwards over the same batches.

python tools/bench_scoring.py --model qwen2.5-0.5b --ranks 1 --output runs/scoring
python tools/bench_scoring.py --dataset gsm8k/train.jsonl --tokenizer Qwen/Qwen2.5-0.5B

Both run in turns in one process; training is without an optimizer step, and its gradients are dropped after each batch.
`<output>/scoring.jsonl` receives a line. The model has random weights. Without `--dataset` the rows are random tokens,
as many in each as GSM8K's have: log-normal, 187 on average, padded to the longest of their batch.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from agsel.elements import METHODS, require_density, require_method
from agsel.errors import AgselError, UserError, one_line
from tools.bench.command import run_ranks
from tools.bench.configurations import LIGER
from tools.bench.rows import Row

PLAN, RESULTS = "scoring-plan.json", "scoring.jsonl"


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is measured. All rows together are divided among the ranks, then into batches of `micro_batch`."""

    model: str = "qwen2.5-0.5b"
    ranks: int = 1
    method: str = "gallop"
    density: float = 0.01
    rows: int = 1000
    micro_batch: int = 8
    liger: str = "none"
    rounds: int = 3
    warmup: int = 4
    dataset: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        require_method(self.method)
        require_density(self.density)
        for name in ("ranks", "micro_batch", "rounds", "warmup"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)} (--{name})")
        if self.rows < self.ranks:
            raise UserError(f"{self.rows} rows are too few for {self.ranks} ranks (--rows)")
        if (self.dataset is None) != (self.tokenizer is None):
            raise UserError("a dataset needs a tokenizer, and a tokenizer a dataset (--dataset, --tokenizer)")


def main(arguments: Sequence[str]) -> None:
    """Measure what the command line asks for, and print the medians."""
    options = vars(_parser().parse_args(arguments))
    folder = Path(options.pop("output"))
    try:
        scoring = Scoring(**options)
        folder.mkdir(parents=True, exist_ok=True)
        typed = shlex.join(["python", "tools/bench_scoring.py", *arguments])
        (folder / PLAN).write_text(json.dumps({"scoring": asdict(scoring), "command": typed}))
        code = run_ranks("tools.bench.scored_ranks", scoring.ranks, folder)
    except (AgselError, OSError) as error:
        sys.exit(f"agsel: error: {one_line(error)}")
    if code == 0:
        print(summary(json.loads((folder / RESULTS).read_text().splitlines()[-1])))
    sys.exit(code)


def ratio(row: Row) -> float:
    """The median time of scoring, as a multiple of that of training."""
    return statistics.median(row["scoring_ms"]) / statistics.median(row["training_ms"])


def summary(row: Row) -> str:
    """A line on what was measured."""
    seconds = [statistics.median(row[f"{name}_ms"]) / 1000 for name in ("scoring", "training")]
    peaks = [row[f"{name}_peak_bytes"] / 1e9 for name in ("scoring", "training")]
    return (
        f"{row['model']}, {row['device']}, {row['rows']} rows of {row['tokens'] / row['rows']:.0f} tokens: "
        f"scoring {seconds[0]:.2f} s, training {seconds[1]:.2f} s, ratio {ratio(row):.3f}; "
        f"peak {peaks[0]:.2f} and {peaks[1]:.2f} GB"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        prog="bench_scoring.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    helps = {
        "model": "built-in shape, folder or hub name",
        "ranks": "processes, one a GPU",
        "method": ", ".join(METHODS),
        "density": "share of the weights that is chosen",
        "rows": "of all ranks together",
        "micro_batch": "rows of a batch",
        "liger": "its fused loss alone, or all of its kernels",
        "rounds": "measurements of each",
        "warmup": "batches of each before them",
        "dataset": "JSON lines with question and answer, instead of random rows",
        "tokenizer": "folder or hub name, for --dataset",
    }
    for field in fields(Scoring):
        kind = str if field.default is None else type(field.default)
        choices = list(LIGER) if field.name == "liger" else None
        parser.add_argument(
            f"--{field.name}", default=field.default, type=kind, choices=choices, help=helps[field.name]
        )
    parser.add_argument("--output", default="runs/scoring", help="folder for the result; lines are added")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
