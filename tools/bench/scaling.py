"""How methods scale over GPUs: table and picture from rows of tools/bench.py that differ in their number of ranks.

python tools/bench.py --plan tools/bench_scaling.yaml --output runs/scaling
python tools/bench_scaling.py runs/scaling     # writes scaling.md and scaling.png there

Weak scaling keeps the micro-batch of each GPU, strong scaling the rows of all GPUs together. Efficiency is tokens per
second and GPU against those of the fewest GPUs measured. Moving: how much longer a step takes than one whose optimizer
states all stay on the GPU (`--offload_states off`), be it the GPU or the host that waits for the copies.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from agsel.errors import AgselError, one_line
from tools.bench.rows import measured_rows, origins
from tools.bench.scaling_picture import draw
from tools.bench.scaling_table import section, summary
from tools.bench.series import strong_scaling, weak_scaling


def main(arguments: Sequence[str]) -> None:
    """Write table and picture."""
    folder = _parser().parse_args(arguments).folder
    try:
        rows = [row for row in measured_rows(folder) if not row["error"]]
    except (AgselError, OSError) as error:
        sys.exit(f"agsel: error: {one_line(error)}")
    kinds = {"weak": weak_scaling(rows), "strong": strong_scaling(rows)}
    sections = [summary(kinds), *(section(name, series) for name, series in kinds.items()), origins(rows)]
    text = "\n".join(line for lines in sections for line in lines)
    (folder / "scaling.md").write_text(text + "\n")
    print(text)
    draw(kinds, folder / "scaling.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        prog="bench_scaling.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="--output of tools/bench.py")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
