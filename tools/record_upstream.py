"""Record in agsel/upstream.json what agsel depends on inside of DeepSpeed, PEFT, transformers and TRL, as installed.

python tools/record_upstream.py

The names are found in agsel's own code: methods that its classes override or use, functions that it imports, and what
its modules list as `RELIES_ON`. `agsel/upstream.py` compares them with what is installed where agsel runs.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from itertools import chain, dropwhile
from pathlib import Path
from types import ModuleType
from typing import Any

from agsel import upstream, zero

PACKAGES = ("deepspeed", "peft", "transformers", "trl")
MODULES = (
    *sorted(f"{zero.__name__}.{file.stem}" for file in Path(*zero.__path__).glob("[!_]*.py")),
    "agsel.low_rank",
    "agsel.runs.trainer",
    "agsel.training.attachment",
    "agsel.training.lean_steps",
    "agsel.training.row_trainer",
    "agsel.training.summary",
)
"""Those of agsel that know the inside of other packages."""


def record() -> dict[str, Any]:
    """The content of agsel/upstream.json."""
    found = {module: sorted(names_in(import_module(module))) for module in MODULES}
    checksums = {name: upstream.checksum_of(name) for name in sorted({*chain(*found.values())})}
    packages = sorted({*map(upstream.package_of, checksums)})
    return {
        "versions": {package: version(package) for package in packages},
        "checksums": {module: {name: checksums[name] for name in names} for module, names in found.items() if names},
        "files": {name: upstream.checksum_of_files(name, checksum) for name, checksum in checksums.items()},
    }


def names_in(module: ModuleType) -> set[str]:
    """What a module of agsel depends on in other packages, by names as of `upstream.checksum_of`."""
    return found_in(module) | listed_in(module)


def found_in(module: ModuleType) -> set[str]:
    """What the code of a module names: functions of the packages, and methods of their classes."""
    tree = ast.parse(inspect.getsource(module))
    used = [*_imported(tree), *_attributes(tree, vars(module), _stock(vars(module)))]
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            used += _attributes(function, vars(module), _annotated(function, vars(module)))
    for derived in _derived_classes(module):
        used += _of_class(derived)
    return {name for owner, function in used for name in _full_names(owner, function)}


def listed_in(module: ModuleType) -> set[str]:
    """What a module lists as `RELIES_ON`, because its code does not name it.

    Raises:
        LookupError: there is no such method or function.
    """
    names = set()
    for owner, functions in vars(module).get("RELIES_ON", {}).items():
        for function in functions:
            full_names = _full_names(owner, function)
            if not full_names:
                raise LookupError(f"{module.__name__}.RELIES_ON: {owner.__name__} has no {function}")
            names |= full_names
    return names


def _imported(tree: ast.AST) -> Iterator[tuple[Any, str]]:
    """Module and name of all that is imported from one of the packages by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and upstream.package_of(node.module) in PACKAGES:
            yield from ((import_module(node.module), alias.name) for alias in node.names)


def _stock(names: Mapping[str, Any]) -> dict[str, Any]:
    """The modules and classes of the packages among the names of a module."""
    return {name: value for name, value in names.items() if _is_stock(value)}


def _is_stock(value: Any) -> bool:
    if inspect.isclass(value):
        return upstream.package_of(value.__module__) in PACKAGES
    return inspect.ismodule(value) and upstream.package_of(value.__name__) in PACKAGES


def _annotated(function: ast.FunctionDef, names: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a function that are instances of a class of the packages, with that class."""
    annotated = {
        argument.arg: names.get(ast.unparse(argument.annotation))
        for argument in (*function.args.args, *function.args.kwonlyargs)
        if argument.annotation
    }
    return _stock(annotated)


def _derived_classes(module: ModuleType) -> list[type]:
    """The classes of a module that have a class of the packages among their bases."""
    own = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]
    return [each for each in own if any(map(_is_stock, each.__mro__))]


def _of_class(derived: type) -> Iterator[tuple[Any, str]]:
    """The class with every name that it, or a mixin of agsel's, defines or uses on `self` or `super()`."""
    for part in derived.__mro__:
        recorded_there = part is not derived and any(map(_is_stock, part.__mro__))
        if upstream.package_of(part.__module__) == "agsel" and not recorded_there:
            yield from ((derived, name) for name in vars(part))
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
            names = vars(import_module(part.__module__))
            yield from _attributes(tree, names, {"self": derived, "super()": derived})


def _attributes(tree: ast.AST, names: Mapping[str, Any], owners: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Owner and name of every attribute that code uses, also by a string.

    Args:
        tree: the code.
        names: of the module around it, for strings that are constants there.
        owners: what expressions stand for.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=place, attr=name):
                used: Any = name
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[place, text, *_]):
                used = text.value if isinstance(text, ast.Constant) else names.get(ast.unparse(text))
            case _:
                continue
        if isinstance(used, str) and (owner := owners.get(ast.unparse(place))):
            yield owner, used


def _full_names(owner: Any, function: str) -> set[str]:
    """Of a function of a module, or of a method: by its packages, and those that could override it. Empty if none."""
    if inspect.ismodule(owner):
        value = inspect.unwrap(getattr(owner, function, None))  # type: ignore[arg-type]
        is_function = inspect.isfunction(value) and upstream.package_of(value.__module__) in PACKAGES
        return {f"{value.__module__}:{function}"} if is_function else set()
    bases = {upstream.package_of(base.__module__): base for base in reversed(owner.__mro__) if _is_stock(base)}
    names = [f"{base.__module__}:{base.__qualname__}.{function}" for base in bases.values()]
    return {*dropwhile(lambda name: upstream.checksum_of(name) is None, names)}


if __name__ == "__main__":
    upstream.TABLE.write_text(json.dumps(record(), indent=2) + "\n")
