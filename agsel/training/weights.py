"""The files of a model folder, by their headers and sizes: what is damaged is named before anything is loaded."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from agsel.errors import UserError, one_line

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
LAYOUTS = (SAFETENSORS, SAFETENSORS + INDEX, PICKLED, PICKLED + INDEX)
"""What `from_pretrained` looks for, in its order."""
READ_AS_TEXT = {".json", ".jinja", ".model", ".txt"}
POINTER = b"version https://git-lfs"
LARGEST_POINTER = 1024
LEGACY_PICKLE = b"\x80"
AGAIN = "bring or download the model anew (--model_name_or_path)"


def require_model_files(folder: Path) -> None:
    """Refuse a model folder whose configuration is no JSON object, or where Git LFS has left pointers for files.

    Raises:
        UserError: names the file.
    """
    _require_no_pointer(path for path in folder.iterdir() if path.suffix in READ_AS_TEXT)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder} (--model_name_or_path) holds an adapter alone: merge it into its model, and name the result"
            )
        raise UserError(f"{folder} (--model_name_or_path) is no model: it has no config.json")
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            read_object(folder / name)


def require_weights(folder: Path) -> None:
    """Refuse a model folder whose weights are not there, are incomplete or are damaged. Reads no weight.

    Raises:
        UserError: names the file.
    """
    files = weight_files(folder)
    _require_no_pointer(files)
    for path in files:
        fault = _fault_of_safetensors(path) if path.suffix == ".safetensors" else _fault_of_pickle(path)
        if fault is not None:
            raise UserError(f"{path} is damaged or cut short ({fault}; it has {path.stat().st_size:,} bytes): {AGAIN}")


def weight_files(folder: Path) -> list[Path]:
    """The files from which `from_pretrained` takes the weights.

    Raises:
        UserError: there are none, or one is missing that the index names.
    """
    chosen = next((folder / name for name in LAYOUTS if (folder / name).is_file()), None)
    if chosen is None:
        raise UserError(
            f"{folder} (--model_name_or_path) holds no weights: it needs {SAFETENSORS}, or shards and their "
            f"{SAFETENSORS + INDEX}"
        )
    return _shards(chosen) if chosen.name.endswith(INDEX) else [chosen]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read, {one_line(error)}: {AGAIN}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object: {AGAIN}")
    return value


def _shards(index: Path) -> list[Path]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} names no weights: {AGAIN}")
    shards = [index.parent / name for name in sorted({*weight_map.values()})]
    missing = [path for path in shards if not path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing, which {index.name} names ({len(missing)} of {len(shards)} files are): {AGAIN}"
        )
    return shards


def _require_no_pointer(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_file() and path.stat().st_size < LARGEST_POINTER and path.read_bytes().startswith(POINTER):
            raise UserError(
                f"{path} is the pointer that Git LFS leaves in place of the file: run `git lfs pull` in the folder, or "
                "download the model (--model_name_or_path)"
            )


def _fault_of_safetensors(path: Path) -> str | None:
    try:
        with safe_open(path, "pt"):
            return None
    except (SafetensorError, OSError) as error:
        return one_line(error)


def _fault_of_pickle(path: Path) -> str | None:
    with path.open("rb") as file:
        legacy = file.read(len(LEGACY_PICKLE)) == LEGACY_PICKLE
    return None if legacy or zipfile.is_zipfile(path) else "neither a zip archive nor a pickle"
