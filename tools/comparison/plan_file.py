"""PLAN.yaml as a plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from agsel import shipped
from agsel.errors import UserError, one_line, suggestion
from agsel.written_yaml import read_yaml
from tools.comparison.plan import BEFORE, Cell, Plan

NEEDED = ("config", "output", "cells", "seeds", "test")
OPTIONAL: dict[str, Any] = {
    "settings": {},
    "evaluate": {},
    "validation": {},
    "other": {},
    "results": None,
    "forgetting": None,
    "learning_rates": [],
    "gpus_per_run": 1,
    "runs_per_gpu": 1,
    "compare_with": [],
}
"""With what they are when they are left out."""


OF_THE_PLAN = {
    "learning_rate": "write `learning_rates: [...]`",
    "seed": "all cells have the same: write `seeds: [...]` for the plan",
    "output_dir": "the plan's `output` has a folder for each run: leave it out",
    "resume_from_checkpoint": "runs go on by themselves: leave it out",
}
"""Flags of launch/train.py that are given to each run, and the remedy."""
TAKEN = (BEFORE, "runs.jsonl", "shared.yaml", "table.md", "table.csv", "pareto.png")
"""What else is in the folder where each cell has one."""


def read_plan(path: Path) -> Plan:
    """The plan in a file; its paths are of the folder where the command was typed.

    With `base`, another plan, it has that one's cells before its own, and whatever it does not name itself.

    Raises:
        UserError: it is none, or names what it must not.
    """
    named = _with_base(path, ())
    settings = _mapping(named, "settings")
    for setting, remedy in OF_THE_PLAN.items():
        if setting in settings:
            raise UserError(f"settings: {setting} is not for all runs: {remedy}")
    return Plan(
        output=Path(str(named["output"])),
        shared={**read_recipe(Path(str(named["config"]))), **settings},
        cells=named["cells"],
        seeds=tuple(_integers(named, "seeds")),
        test=_mapping(named, "test"),
        validation=_mapping(named, "validation"),
        other=_mapping(named, "other"),
        evaluate=_mapping(named, "evaluate"),
        forgetting=_text(named, "forgetting"),
        results=None if named["results"] is None else Path(str(_text(named, "results"))),
        gpus_per_run=_count(named, "gpus_per_run"),
        runs_per_gpu=_count(named, "runs_per_gpu"),
        compare_with=tuple(map(str, _sequence(named, "compare_with"))),
        of_base=named["of_base"],
    )


def _with_base(path: Path, above: Sequence[Path]) -> dict[str, Any]:
    """What a plan and those that it goes on from name, with `cells` as such, and `of_base`, the names of the others."""
    own = _read(path)
    base = own.pop("base", None)
    if not isinstance(base, str | None) or (base is not None and Path(base) in (*above, path)):
        raise UserError(f"base in the plan {path} is {base!r}: write the name of another plan, or leave it out")
    before = _with_base(Path(base), (*above, path)) if base else {"cells": {}, "of_base": frozenset()}
    named = {**OPTIONAL, **before, **own}
    _require_names({name: value for name, value in named.items() if name != "of_base"}, path)
    rates = named["learning_rates"]
    mapping = _mapping({"cells": {}, **own}, "cells")
    twice = next((name for name in mapping if name in before["cells"]), None)
    if twice is not None:
        raise UserError(f"the plan {path} has a cell {twice}, and so has its base {base}: give it another name")
    cells = {str(name): _cell(str(name), settings, rates) for name, settings in mapping.items()}
    return {**named, "cells": {**before["cells"], **cells}, "of_base": frozenset(before["cells"])}


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of `--config` that have a value, from a file or a recipe's name.

    Raises:
        UserError: there is no such file, or it has no settings.
    """
    found = path if path.is_file() else shipped.recipe(str(path))
    if found is None:
        raise UserError(f"config: there is no {path}, launch/recipes/ has some")
    # A file that a run has written names all settings, those without a value, too.
    return {name: value for name, value in _read(found).items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"no such file: {path}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is no YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} has no settings: write one `name: value` a line, as tools/comparison/*.yaml do")
    return content


def _require_names(named: Mapping[str, Any], path: Path) -> None:
    known = (*NEEDED, *OPTIONAL)
    unknown = next((name for name in named if name not in known), None)
    if "model_name_or_path" in named and not named["cells"]:
        raise UserError(f"{path} has no cells: it is no plan; a recipe goes with --config, and --runs METHOD:RATE ...")
    if unknown is not None:
        raise UserError(f"unknown name {unknown!r} in the plan {path}{suggestion(str(unknown), known)}")
    missing = [name for name in NEEDED if named.get(name) in (None, {}, [])]
    if missing:
        raise UserError(f"the plan {path} has no {missing[0]}: tools/comparison/*.yaml show what belongs there")


def _cell(name: str, settings: Any, rates: Sequence[Any]) -> Cell:
    if not re.fullmatch(r"\w[\w.+-]*", name) or name in TAKEN:
        raise UserError(f"{name!r} names no cell: take letters, digits, `.`, `+`, `-` and `_`, and none of {TAKEN}")
    if not isinstance(settings, dict):
        raise UserError(f"cell {name} has no settings: write `{name}: {{method: ...}}`")
    own = dict(settings)
    rates = own.pop("learning_rates", rates)
    empty = next((setting for setting, value in own.items() if value is None), None)
    if empty is not None:
        raise UserError(f"cell {name}: {empty} has no value: give it one, or leave it out")
    try:
        if not isinstance(rates, list) or any(isinstance(rate, bool) for rate in rates):
            raise TypeError("no list of numbers")
        return Cell(name, own, tuple(map(float, rates)))
    except (TypeError, ValueError) as error:
        raise UserError(f"cell {name}: learning_rates is {rates!r}: write a list of numbers, [1.0e-4]") from error


def _text(named: Mapping[str, Any], name: str) -> str | None:
    value = named[name]
    if not isinstance(value, str | None):
        raise UserError(f"{name} in the plan is {value!r}: write the name of a file")
    return value


def _mapping(named: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = named[name]
    if not isinstance(value, dict):
        raise UserError(f"{name} in the plan is {value!r}: write `{name}: {{flag: value}}`")
    return value


def _sequence(named: Mapping[str, Any], name: str) -> list[Any]:
    value = named[name]
    if not isinstance(value, list):
        raise UserError(f"{name} in the plan is {value!r}: write a list, `{name}: [...]`")
    return value


def _integers(named: Mapping[str, Any], name: str) -> list[int]:
    values = _sequence(named, name)
    if any(type(value) is not int or not 0 <= value < 2**32 for value in values) or len(set(values)) < len(values):
        raise UserError(f"{name} in the plan is {values!r}: write different whole numbers from 0 to 2^32 - 1")
    return values


def _count(named: Mapping[str, Any], name: str) -> int:
    value = named[name]
    if type(value) is not int or value < 1:
        raise UserError(f"{name} in the plan is {value!r}: it must be a whole number from 1 on")
    return value
