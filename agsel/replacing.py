"""Files that are complete, or as they were before."""

import errno
import os
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write a file whole and put it in the place of another, which a link may name.

    Raises:
        OSError: it cannot be written, or something else than a file has its name; what was there still is.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is no file that could be replaced", str(path))
    staged = path.with_name(f".{path.name}.new")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    except Exception:
        staged.unlink(missing_ok=True)
        raise
