"""Files that are complete, or as they were before."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write a text, as of `replacing`."""
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a file to write whole, which then takes the place of another that a link may name.

    Raises:
        OSError: it cannot be written, or something else than a file has its name; what was there still is.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is no file that could be replaced", str(path))
    staged = path.with_name(f".{path.name}.new")
    try:
        yield staged
        os.replace(staged, path)
    except Exception:
        staged.unlink(missing_ok=True)
        raise
