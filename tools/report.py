"""One page that tells what a run has done, or how several compare: pictures, tables, settings; it needs no network.

python tools/report.py RUN [RUN ...] [--output report.html]

RUN is the `--output_dir` of a run of `launch/train.py`, also one that goes on or was killed; at its end a run makes its
page itself. Several runs are compared to the first one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from agsel.errors import AgselError, one_line
from agsel.report import REPORT, require_place, write_report


def main(arguments: list[str]) -> None:
    """Write the page, and say where it is."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help="file to write; by default report.html, of one run in its folder")
    options = parser.parse_args(arguments)
    output = options.output or Path(options.runs[0] if len(options.runs) == 1 else ".", REPORT)
    try:
        if options.output is not None or output.exists():
            require_place(output)
        write_report(options.runs, output)
    except AgselError as error:
        sys.exit(f"agsel: error: {one_line(error)}")
    print(f"report    {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
