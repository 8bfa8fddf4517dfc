"""Values as files write them, and as text."""

from __future__ import annotations

import json
from typing import Any


class FileNumber(str):
    """A number as it is written in a file. Format specifications, as in `{price:.2f}`, see its value."""

    @property
    def value(self) -> int | float:
        """The number."""
        return int(self) if self.lstrip("-").isdigit() else float(self)

    def __format__(self, specification: str) -> str:
        return format(self.value, specification) if specification else str(self)

    def __repr__(self) -> str:
        return str(self)


def plain(value: Any) -> Any:
    """The same with numbers in place of their spelling, also inside lists and objects."""
    if isinstance(value, FileNumber):
        return value.value
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value


def without_nulls(value: Any) -> Any:
    """The same without the null members of objects."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return value


def is_text(value: Any) -> bool:
    """Whether it is text, and not a number's spelling."""
    return isinstance(value, str) and not isinstance(value, FileNumber)


def as_text(value: Any) -> str:
    """A value as a file would write it; nothing for null."""
    if value is None:
        return ""
    return as_json(value) if isinstance(value, bool | list | dict) else str(value)


def as_json(value: Any) -> str:
    """A value as JSON, in which numbers keep their spelling."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_json, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_json(name)}: {as_json(member)}" for name, member in value.items()) + "}"
    return str(value) if isinstance(value, FileNumber) else json.dumps(value, ensure_ascii=False, default=str)


def kind_name(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if isinstance(value, bool):
        return f"a truth value ({as_text(value)})"
    if isinstance(value, FileNumber | int | float):
        return f"a number ({value})"
    names = {str: "text", bytes: "bytes", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
