"""Run `agsel.train` in one process on one command line after the other.

    python tests/several_runs.py CASES.json

CASES.json maps a name to a command line. Prints one JSON object: name -> [exit code, output, step reached].
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from agsel import train


def outcome(arguments: list[str]) -> tuple[int | str | None, str, int]:
    gc.freeze()  # what is here stays: a Trainer would search it for garbage every time
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            trainer: Any = train.main(arguments)
        except SystemExit as end:
            return end.code, output.getvalue(), 0
        except Exception:
            return 2, output.getvalue() + traceback.format_exc(), 0
    return 0, output.getvalue(), trainer.state.global_step


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    print("RESULT", json.dumps({name: outcome(arguments) for name, arguments in cases.items()}))
