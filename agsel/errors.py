"""Ends of a run that agsel foresaw. Their message is one line that says all; any other error is a bug or a fault."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class AgselError(Exception):
    """An end that agsel foresaw: commands print the message as one line and no traceback."""


class UserError(AgselError, ValueError):
    """A setting, model or file that cannot work. The message names the setting and the remedy."""


class MissingError(AgselError, FileNotFoundError):
    """A file that must be there and is not."""


class RunError(AgselError, RuntimeError):
    """A run that cannot go on as it is: its ranks disagree, its gradients are not finite, its disk is full."""


class ParserComplaints:
    """Before an `argparse.ArgumentParser` among the bases of a class: its complaints are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line.

        Raises:
            UserError: with the message.
        """
        raise UserError(message)


@contextmanager
def complaints_of_libraries() -> Iterator[None]:
    """Take the errors by which other packages refuse what the user gave them for the user's mistakes.

    For calls that read settings, models and data, and run no code of agsel's, whose bugs would pass as mistakes.

    Raises:
        UserError: in place of a ValueError, OSError or ImportError, with its message.
    """
    try:
        yield
    except AgselError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise UserError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'answer'?` where a known name is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def require_known(
    words: Iterable[str], known: Iterable[str], where: str, instead: Mapping[str, str] | None = None
) -> None:
    """Refuse words of a command line that no parser has taken.

    Args:
        words: that are left, values behind their names.
        known: names of settings.
        where: they stand, for the message.
        instead: of settings of other tools, what to do.

    Raises:
        UserError: there is one.
    """
    name = next((word for word in words if word.startswith("--")), next(iter(words), None))
    if name is not None:
        name = name.removeprefix("--").split("=")[0]
        if instead and name in instead:
            raise UserError(f"{name} {where} is not supported: {instead[name]}")
        raise UserError(f"unknown setting {name!r} {where}{suggestion(name, known)}")


def not_here_either(name: str, kind: str = "folder") -> str:
    """What to add to a hub's refusal of a name: that it is no path here; nothing if it is one."""
    return "" if Path(name).exists() else f"; there is no such {kind} here either"


@contextmanager
def said_of(what: str) -> Iterator[None]:
    """Say of which of several things a `UserError` is, unless it does already."""
    try:
        yield
    except UserError as error:
        raise error if what in str(error) else UserError(f"{what}: {error}") from error
