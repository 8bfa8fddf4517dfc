"""Plain English that every machine with Python has: its language reference, for what a model forgets.

    python tools/quality/plain_text.py data/plain_text.txt

writes the topics that `help()` shows, in alphabetical order, whole ones as long as they fit. Versions of Python differ
in their text: compare perplexities of the same file only, which `tools/compare_quality.py` sees to.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

LARGEST = 100_000
"""Characters: some 25 thousand tokens."""


def text_of(topics: Mapping[str, str]) -> str:
    """The first topics, of `LARGEST` characters together at most."""
    chosen, length = [], 0
    for name in sorted(topics):
        text = topics[name].strip() + "\n\n"
        if length + len(text) <= LARGEST:
            chosen.append(text)
            length += len(text)
    return "".join(chosen)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text_of(topics), encoding="utf-8")


if __name__ == "__main__":
    main()
