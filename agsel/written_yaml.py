"""YAML as people write it: a name that stands twice is a mistake, of which a dictionary would keep the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from agsel.errors import UserError


def read_yaml(path: Path) -> Any:
    """What is in a file.

    Raises:
        UserError: a name stands twice in a mapping.
        OSError: it cannot be read.
        ValueError: it is no text in UTF-8.
        yaml.YAMLError: it is no YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueNames)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _UniqueNames(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise UserError(f"{name} stands in line {lines[name]} and again in line {line}: leave one out")
            lines[name] = line
        return super().construct_mapping(node, deep)
