"""Which elements of which weights are trained, and the file that keeps it."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from agsel.errors import UserError, said_of
from agsel.replacing import replacing

INDICES, VALUES = ".indices", ".values"
"""What follows the name of a weight in a file of elements."""
HEADER = "agsel"
"""The entry of the file's metadata that tells shapes and origin, as JSON."""


@dataclass(frozen=True, eq=False)
class ElementMask:
    """Chosen elements by the names of their weights; equal on all ranks.

    Attributes:
        indices: int32 [k] for each weight that has any, positions in the flattened weight, ascending; on the CPU.
        shapes: of these weights.
        about: where it comes from, for people and for whoever loads it: plain values.
    """

    indices: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Elements chosen."""
        return sum(indices.numel() for indices in self.indices.values())

    @property
    def checksum(self) -> int:
        """32 bits over names and indices."""
        value = 0
        for name in sorted(self.indices):
            value = zlib.crc32(self.indices[name].numpy().tobytes(), zlib.crc32(name.encode(), value))
        return value

    def require_valid(self) -> None:
        """Refuse a mask made by hand, or by a damaged file, that no weights can have.

        Raises:
            UserError: names the weight.
        """
        if not self.indices:
            raise UserError("the mask has no elements: make one with agsel.choose_elements")
        for name, indices in self.indices.items():
            numel = math.prod(self.shapes.get(name, (0,)))
            is_list = indices.dtype is torch.int32 and indices.dim() == 1 and indices.numel() > 0
            if not (is_list and _ascend(indices) and indices[0] >= 0 and indices[-1] < numel):
                raise UserError(
                    f"the mask of {name} is not valid: its indices must be int32, ascending without repetition, and "
                    f"positions in a weight of {numel:,} elements"
                )

    def save(self, path: Path) -> None:
        """Write it, in the form that `load` reads."""
        write(path, {name + INDICES: indices for name, indices in self.indices.items()}, self.shapes, self.about)

    @classmethod
    def load(cls, path: Path) -> ElementMask:
        """That of a file of `save` or `agsel.elements.export_elements`.

        Raises:
            UserError: the file is none of these, or damaged.
        """
        mask = cls(*read(path, INDICES))
        with said_of(str(path)):
            mask.require_valid()
        return mask


def _ascend(indices: torch.Tensor) -> bool:
    return bool((indices[1:] > indices[:-1]).all())


def write(
    path: Path, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], about: Mapping[str, Any]
) -> None:
    """Write a file of elements; complete or not at all."""
    header = json.dumps({"shapes": {name: list(shape) for name, shape in shapes.items()}, "about": dict(about)})
    with replacing(path) as staged:
        save_file(dict(tensors), staged, metadata={HEADER: header, "format": "pt"})


def read(path: Path, *kinds: str) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, ...]], dict[str, Any]]:
    """Of a file of elements the tensors whose names end in `kinds`, shapes and origin.

    With one kind, the names are those of the weights.

    Raises:
        UserError: it is no such file, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.endswith(kinds)}  # noqa: SIM118
        shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}
        about = dict(header["about"])
    except FileNotFoundError as error:
        raise UserError(f"there is no file of elements {path}") from error
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of elements, or damaged: use one that agsel has written") from error
    if len(kinds) == 1:
        tensors = {name.removesuffix(kinds[0]): tensor for name, tensor in tensors.items()}
    return tensors, shapes, about
