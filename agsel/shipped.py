"""What comes with agsel besides code, by name: DeepSpeed configurations (`zero2`) and recipes (`demo`).

An installed package holds them itself; in a clone they are where people look for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
IN_CLONE = {"ds_configs": PACKAGE.parent / "ds_configs", "recipes": PACKAGE.parent / "launch" / "recipes"}


def zero_configuration(name: str) -> Path | None:
    """The file of a DeepSpeed configuration: `zero1`, `zero2`, `zero3`. None if there is no such one."""
    return _find("ds_configs", f"{name}.json")


def configuration_of_stage(stage: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a ZeRO stage, 1 to 3."""
    file = zero_configuration(f"zero{stage}")
    assert file is not None, "every stage is shipped"
    return json.loads(file.read_text())


def recipe(name: str) -> Path | None:
    """The file of a recipe, None if there is no such one."""
    return _find("recipes", f"{name}.yaml")


def names(kind: str) -> list[str]:
    """The names of all `ds_configs` or `recipes`."""
    return sorted(path.stem for path in _folder(kind).iterdir() if path.suffix in (".json", ".yaml"))


def _find(kind: str, name: str) -> Path | None:
    path = _folder(kind) / name
    return path if path.is_file() else None


def _folder(kind: str) -> Path:
    installed = PACKAGE / kind
    return installed if installed.is_dir() else IN_CLONE[kind]
