"""Run `launch/train.py` in one process on one command line after the other, each of which must be refused.

    python tests/bad_input_worker.py CASES.json

CASES.json maps a name to a command line; prints one JSON object that maps the name to [exit code, stderr].
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from agsel import train


def refusal(arguments: list[str]) -> tuple[int | str | None, str]:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            train.main(arguments)
        except SystemExit as end:
            return end.code, errors.getvalue()
    return None, errors.getvalue()


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    print("RESULT", json.dumps({name: refusal(arguments) for name, arguments in cases.items()}))
