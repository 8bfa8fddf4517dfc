"""Other packages' private methods that agsel depends on: whether they are the ones that it was tested with.

agsel overrides methods of DeepSpeed, PEFT, transformers and TRL that no version promises to keep. `upstream.json`
holds, for every module of agsel that does, a checksum of each of these methods and of the functions that it calls, so
that a version in which one of them changed is refused by name instead of training wrongly. `null` stands for a method
that a package does not have, but could put between agsel's and the one of another package. Beside them it holds
checksums of the files: where these are the tested ones, they need not be parsed. `tools/record_upstream.py` writes it.
"""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import io
import json
import os
import re
import tokenize
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agsel.errors import RunError

ALLOW_UNTESTED = "AGSEL_ALLOW_UNTESTED"
TABLE = Path(__file__).with_name("upstream.json")

PLAIN_STRING = re.compile(r"[rbu]{0,2}[\"']", re.IGNORECASE)
FSTRING_START = getattr(tokenize, "FSTRING_START", None)
FSTRING_END = getattr(tokenize, "FSTRING_END", None)
"""From Python 3.12 on, an f-string is several tokens."""


@cache
def table() -> dict[str, dict[str, Any]]:
    """What agsel was tested with.

    Returns:
        `versions` of packages, `checksums` by module of agsel and by name as of `checksum_of`, and `files` by name as
        of `checksum_of_files`.
    """
    return json.loads(TABLE.read_text())


def require_tested(*modules: str) -> None:
    """Compare what modules of agsel depend on in other packages with what they were tested with.

    Args:
        modules: of agsel, by their dotted names.

    Raises:
        RunError: a method or function is gone or its source differs; only a warning if AGSEL_ALLOW_UNTESTED=1.
    """
    tested = {name: checksum for module in modules for name, checksum in table()["checksums"][module].items()}
    files = table()["files"]
    to_read = [name for name, found in tested.items() if checksum_of_files(name, found) != files.get(name)]
    changed = {name: found for name in to_read if (found := checksum_of(name)) != tested[name]}
    if not changed:
        return
    message = _describe(changed)
    if os.environ.get(ALLOW_UNTESTED) != "1":
        raise RunError(message)
    warnings.warn(message, stacklevel=3)


def _describe(changed: dict[str, str | None]) -> str:
    versions = {package: table()["versions"][package] for package in sorted(set(map(package_of, changed)))}
    differences = []
    for package, tested in versions.items():
        names = [name if changed[name] else f"{name} (gone)" for name in changed if package_of(name) == package]
        differences.append(f"{package} {version(package)} differs from the tested {tested} in {', '.join(names)}")
    remedy = " ".join(f"{package}=={tested}" for package, tested in versions.items())
    return (
        f"{'; '.join(differences)}: install {remedy}, or set {ALLOW_UNTESTED}=1 after running agsel's tests with yours"
    )


def checksum_of(name: str) -> str | None:
    """The checksum of a method or function of another package, None if there is none.

    Args:
        name: `package.module:function` or `package.module:Class.method`. A method may be inherited from another class
            of the same package.
    """
    sources = [_functions(module).get(function) for module, function in _places(name)]
    return next((checksum(source) for source in sources if source is not None), None)


def checksum_of_files(name: str, found: str | None) -> str:
    """A checksum of what `checksum_of` found and of all that it looked at, without parsing it.

    Args:
        name: as of `checksum_of`.
        found: by it.
    """
    looked_at = [(*place, _text_checksum(place[0])) for place in _places(name)]
    return f"{zlib.crc32(repr((found, looked_at)).encode()):08x}"


def _places(name: str) -> list[tuple[str, str]]:
    """(module, function or `Class.method` in it) for all places of a function; the first where it is counts."""
    module, _, path = name.partition(":")
    *owner, function = path.split(".")
    try:
        place: Any = reduce(getattr, owner, importlib.import_module(module))
    except (ImportError, AttributeError):
        return []
    if not owner:
        return [(module, function)]
    bases = [base for base in getattr(place, "__mro__", ()) if package_of(base.__module__) == package_of(module)]
    return [(base.__module__, f"{base.__name__}.{function}") for base in bases]


@cache
def _text_checksum(module: str) -> int:
    """Of the text of a module, as `_functions` has it."""
    return zlib.crc32(_text(module).encode())


@cache
def _text(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def package_of(name: str) -> str:
    """`deepspeed` of `deepspeed.runtime.engine:DeepSpeedEngine.destroy`."""
    return name.split(".")[0]


def checksum(source: str) -> str:
    """Of a function's source. Comments, docstrings, and the spaces and line breaks between words do not change it.

    Nor does the version of Python: its syntax trees differ, but not its words if f-strings are left in one piece.
    """
    return f"{zlib.crc32(' '.join(_words(source)).encode()):08x}"


@cache
def _functions(module: str) -> dict[str, str]:
    """The source of every function in the body of a module, and in the body of its classes as `Class.method`.

    From the text of the module: decorators of DeepSpeed hide its methods from `inspect.getsource`.
    """
    source = _text(module)
    lines = io.StringIO(source).readlines()
    found: dict[str, str] = {}
    with _no_garbage_collection():
        for name, node in _definitions(ast.parse(source).body):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            text = "".join([*lines[first - 1 : node.end_lineno], "\n"])  # the last line may end in a backslash
            found[name] = found.get(name, "") + text  # of a property, all parts
    return found


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A syntax tree has so many nodes that all else in memory would be searched over and over."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _definitions(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{name}", method) for name, method in _definitions(node.body))


def _words(source: str) -> Iterator[str]:
    """The words of Python code, with marks where a statement ends and where its indentation changes."""
    statement: list[str] = []
    for kind, word in _tokens(source):
        if kind == tokenize.NEWLINE:
            if not all(map(PLAIN_STRING.match, statement)):  # else a docstring
                yield from (*statement, "<newline>")
            statement = []
        elif kind in (tokenize.INDENT, tokenize.DEDENT):
            yield "<indent>" if kind == tokenize.INDENT else "<dedent>"
        elif kind not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            statement.append(word)


def _tokens(source: str) -> Iterator[tuple[int, str]]:
    """Kind and text of every token, an f-string being one token as it was before Python 3.12."""
    lines = io.StringIO(source).readlines()
    inside, start = 0, (0, 0)
    for token in tokenize.generate_tokens(iter(lines).__next__):
        if token.type == FSTRING_START:
            start = start if inside else token.start
            inside += 1
        elif token.type == FSTRING_END:
            inside -= 1
            if not inside:
                yield tokenize.STRING, _between(lines, start, token.end)
        elif not inside:
            yield token.type, token.string


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text from one place to another, as (row from 1, column)."""
    rows = lines[start[0] - 1 : end[0]]
    rows[-1] = rows[-1][: end[1]]
    rows[0] = rows[0][start[1] :]
    return "".join(rows)
