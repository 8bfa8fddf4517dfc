"""Files that are complete, or as they were before."""

import os
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write a file whole and put it in the place of another.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    staged = path.with_name(f".{path.name}.new")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    except Exception:
        staged.unlink(missing_ok=True)
        raise
