"""Packages without which agsel cannot be imported: one that is missing is named in one line, with its pip command.

`agsel` imports this module before all others, so it is refused without those of the library. `agsel.commands` does the
same for all that its commands need.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from types import TracebackType

from agsel.place import is_first_of_host

REQUIREMENTS = {
    "torch": "torch>=2.9",
    "deepspeed": "deepspeed>=0.19.8,<0.20",
    "transformers": "transformers>=5.17,<6",
    "trl": "trl>=1.16,<2",
    "peft": "peft>=0.21",
    "accelerate": "accelerate>=1.15",
    "datasets": "datasets>=5.2",
    "tensorboard": "tensorboard>=2.20",
    "numpy": "numpy>=2",
    "pyarrow": "pyarrow>=24",
    "pydantic": "pydantic>=2",
    "jinja2": "jinja2>=3.1",
    "matplotlib": "matplotlib>=3.10",
    "psutil": "psutil>=5.9",
    "yaml": "pyyaml>=6",
}
"""By module, what `pip install` takes."""
LIBRARY = ("torch", "deepspeed", "numpy", "psutil")
"""Modules that `import agsel` needs."""


class MissingPackageError(ImportError):
    """A package that agsel needs is not installed."""


def require_installed(modules: Iterable[str]) -> None:
    """Refuse to go on without a package. Where nobody catches the error, it is printed as one line.

    Args:
        modules: some of `REQUIREMENTS`.

    Raises:
        MissingPackageError: names all that are missing.
    """
    missing = [module for module in modules if not _is_installed(module)]
    if missing:
        sys.excepthook = _in_one_line
        raise MissingPackageError(
            f"not installed for {sys.executable}: {', '.join(missing)}; {' && '.join(_commands(missing))}, or install "
            "all that agsel needs as README.md says"
        )


def _commands(missing: list[str]) -> Iterator[str]:
    """DeepSpeed comes last, as its build imports torch; its operators are compiled when they are needed."""
    others = [f"'{REQUIREMENTS[module]}'" for module in missing if module != "deepspeed"]
    if others:
        yield f"pip install {' '.join(others)}"
    if "deepspeed" in missing:
        yield f"DS_BUILD_OPS=0 pip install --no-build-isolation '{REQUIREMENTS['deepspeed']}'"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In the form of `agsel.errors`, which cannot be imported yet; of the ranks of a host, one speaks."""
    if not isinstance(error, MissingPackageError):
        sys.__excepthook__(kind, error, trace)
    else:
        if is_first_of_host():
            sys.stderr.write(f"agsel: error: {error}\n")
        sys.exit(2)  # as `agsel.runs.ranks.REFUSED`


require_installed(LIBRARY)
