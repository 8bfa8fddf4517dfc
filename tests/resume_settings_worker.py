"""Train with `launch/train.py`, then resume in the same process with changed settings, one case after the other.

    python tests/resume_settings_worker.py CASES.json

CASES.json maps a name to a command line; the first makes the checkpoints. Prints one JSON object that maps the name to
[exit code, output, step reached].
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from agsel import train


def outcome(arguments: list[str]) -> tuple[int | str | None, str, int]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            trainer: Any = train.main(arguments)
        except SystemExit as end:
            return end.code, output.getvalue(), 0
    return 0, output.getvalue(), trainer.state.global_step


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    print("RESULT", json.dumps({name: outcome(arguments) for name, arguments in cases.items()}))
