"""What is measured: option sets of the command line or of a YAML plan, multiplied out to configurations."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from agsel.errors import UserError
from agsel.written_yaml import read_yaml
from tools.bench.compared_methods import canonical
from tools.bench.configurations import Configuration

OPTIONS: dict[str, str] = {
    "models": "model",
    "stages": "stage",
    "methods": "method",
    "ranks": "ranks",
    "fractions": "fraction",
    "densities": "density",
    "select_from": "select_from",
    "shapes": "shape",
    "liger": "liger",
    "checkpointing": "checkpointing",
    "compile": "compile",
    "offload_states": "offload_states",
    "accumulation": "accumulation",
}
"""Option of the command line and of a plan -> field of the configuration; a shape is two of them."""
REQUIRED = ("models", "stages", "methods")


def read_plan(path: Path) -> list[dict[str, Any]]:
    """The option sets of a plan.

    Raises:
        UserError: no such file, or no list of option sets in it.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path} (--plan); tools/bench.yaml is one")
    try:
        plan = read_yaml(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML (--plan): {error}") from error
    if not isinstance(plan, list) or not all(isinstance(options, dict) for options in plan):
        raise UserError(f"{path} is no list of option sets (--plan): write it as tools/bench.yaml")
    return plan


def expand(option_sets: Iterable[dict[str, Any]]) -> list[Configuration]:
    """The configurations that option sets describe: the product of the values of each, without repetition.

    Raises:
        UserError: an unknown option or value.
    """
    described = (configuration for options in option_sets for configuration in _product(options))
    return list(dict.fromkeys(map(canonical, described)))


def _product(options: dict[str, Any]) -> Iterable[Configuration]:
    if unknown := options.keys() - OPTIONS.keys():
        raise UserError(f"unknown option {sorted(map(str, unknown))[0]!r} in the plan: use {', '.join(OPTIONS)}")
    if missing := [name for name in REQUIRED if name not in options]:
        raise UserError(f"an option set of the plan has no {missing[0]}: add it")
    values = [value if isinstance(value, list) else [value] for value in options.values()]
    for chosen in itertools.product(*values):
        named = dict(zip((OPTIONS[name] for name in options), chosen, strict=True))
        yield Configuration(**_fields_of(named))


def _fields_of(named: dict[str, Any]) -> dict[str, Any]:
    """`shape` split in two, `on` and `off` as truth values."""
    if "shape" in named:
        named |= _shape(str(named.pop("shape")))
    return {name: {"on": True, "off": False}.get(value, value) for name, value in named.items()}


def _shape(text: str) -> dict[str, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise UserError(f"{text!r} is no shape (--shapes): write rows x tokens of a micro-batch, for example 8x512")
    rows, length = text.split("x")
    return {"micro_batch": int(rows), "sequence": int(length)}
