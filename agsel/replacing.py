"""Files that are complete, or as they were before."""

import os
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write a file whole and put it in the place of another.

    Raises:
        OSError: it cannot be written.
    """
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)
