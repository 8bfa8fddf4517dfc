"""Files of elements: small, exact, and refused in one line when they are not what they should be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agsel.elements import ElementMask, element_layers, export_elements, load_elements, use_elements
from agsel.elements.files import base_of
from agsel.elements.mask import HEADER
from agsel.errors import UserError
from tests.tiny import random_mask, tiny_model

ABOUT = {"base_model": "some/base", "method": "gallop", "density": 0.1}
DTYPES = [torch.float32, torch.bfloat16]
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def trained(dtype: torch.dtype, path: Path, about: Mapping[str, Any] = ABOUT) -> dict[str, Tensor]:
    """Weights after something like a training, whose elements are in the file."""
    model = tiny_model(dtype=dtype)
    use_elements(model, random_mask(model, 0.1))
    torch.manual_seed(4)
    for layer in element_layers(model).values():
        torch.nn.init.normal_(layer.values)
        layer.write()
    weights = {name: weight for name, weight in model.state_dict().items() if not name.endswith(".values")}
    export_elements(model, weights, path, about)
    return weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "elements.safetensors"
    trained(torch.float32, path)
    return path


def test_a_mask_comes_back(tmp_path: Path) -> None:
    mask = random_mask(tiny_model(), 0.1)
    mask = ElementMask(mask.indices, mask.shapes, ABOUT)
    mask.save(tmp_path / "mask.safetensors")
    loaded = ElementMask.load(tmp_path / "mask.safetensors")
    assert (loaded.shapes, loaded.about, loaded.numel) == (mask.shapes, mask.about, mask.numel)
    assert loaded.checksum == mask.checksum
    assert loaded.indices.keys() == mask.indices.keys()
    assert all(torch.equal(loaded.indices[name], indices) for name, indices in mask.indices.items())
    assert {indices.dtype for indices in loaded.indices.values()} == {torch.int32}
    assert [entry.name for entry in tmp_path.iterdir()] == ["mask.safetensors"]


def test_checksums_differ() -> None:
    mask = random_mask(tiny_model(), 0.1)
    name = next(iter(mask.indices))
    for indices in (mask.indices[name] + 1, mask.indices[name][1:]):
        assert ElementMask({**mask.indices, name: indices}, mask.shapes).checksum != mask.checksum


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_and_file_are_the_trained_model(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "elements.safetensors"
    weights = trained(dtype, path)
    model = tiny_model(dtype=dtype)
    changed = sum(int((value != weights[name]).sum()) for name, value in model.state_dict().items())
    assert load_elements(model, path) == {**ABOUT, "dtype": str(dtype).removeprefix("torch.")}
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert 0 < changed <= random_mask(tiny_model(), 0.1).numel
    assert base_of(path)["base_model"] == "some/base"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_takes_its_index_and_its_value(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "elements.safetensors"
    trained(dtype, path)
    mask = random_mask(tiny_model(), 0.1)
    header = 400 * len(mask.indices) + 100
    assert path.stat().st_size <= mask.numel * (4 + dtype.itemsize) + header


def test_the_mask_of_a_file_of_trained_elements(file: Path) -> None:
    assert ElementMask.load(file).checksum == random_mask(tiny_model(), 0.1).checksum


def of_nothing_known(path: Path) -> None:
    save_file({"a": torch.zeros(3)}, path)


def of_another_header(path: Path) -> None:
    save_file({WEIGHT + ".indices": torch.zeros(1).int()}, path, metadata={HEADER: "[]"})


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_header(path: Path) -> None:
    os.truncate(path, 5)


def changed_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    shapes = {name: tuple(weight.shape) for name, weight in tiny_model().named_parameters()}
    save_file(tensors, path, metadata={HEADER: json.dumps({"shapes": shapes, "about": {}})})


def without_values(path: Path) -> None:
    rewritten(path, lambda tensors: tensors.pop(WEIGHT + ".values"))


def with_fewer_values(path: Path) -> None:
    rewritten(path, lambda tensors: tensors.update({WEIGHT + ".values": torch.zeros(3)}))


def with_far_indices(path: Path) -> None:
    rewritten(path, lambda tensors: tensors[WEIGHT + ".indices"].add_(28 * 28))


def with_mixed_indices(path: Path) -> None:
    rewritten(path, lambda tensors: tensors.update({WEIGHT + ".indices": tensors[WEIGHT + ".indices"].flip(0)}))


def without_shapes(path: Path) -> None:
    save_file(load_file(path), path, metadata={HEADER: json.dumps({"shapes": {}, "about": {}})})


UNREADABLE = {
    "missing": (Path.unlink, "there is no file of elements"),
    "text": (lambda path: path.write_text("elements"), "is no file of elements, or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is no file of elements, or damaged"),
    "folder": (folder, "is no file of elements, or damaged"),
    "truncated": (truncated, "is no file of elements, or damaged"),
    "cut header": (cut_header, "is no file of elements, or damaged"),
    "changed header": (changed_header, "is no file of elements, or damaged"),
    "of nothing known": (of_nothing_known, "is no file of elements, or damaged"),
    "of another header": (of_another_header, "is no file of elements, or damaged"),
    "far indices": (with_far_indices, "is not valid"),
    "mixed indices": (with_mixed_indices, "is not valid"),
    "without shapes": (without_shapes, "is not valid"),
}
UNUSABLE = {
    "without values": (without_values, "has no value for each element"),
    "fewer values": (with_fewer_values, "has no value for each element"),
}


@pytest.mark.parametrize("fault", UNREADABLE)
def test_a_wrong_file_is_refused_in_one_line(file: Path, fault: str) -> None:
    damage, message = UNREADABLE[fault]
    damage(file)
    model = tiny_model()
    for read in (lambda: ElementMask.load(file), lambda: load_elements(model, file)):
        with pytest.raises(UserError) as error:
            read()
        assert message in str(error.value)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", UNUSABLE)
def test_wrong_values_are_refused_before_any_is_written(file: Path, fault: str) -> None:
    damage, message = UNUSABLE[fault]
    damage(file)
    model = tiny_model()
    with pytest.raises(UserError, match=message):
        load_elements(model, file)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True))


def test_a_file_of_another_model_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match=r"down_proj.weight is 28 x 36 there and 28 x 40 here"):
        load_elements(tiny_model(intermediate=40), file)
    with pytest.raises(UserError, match=r"this one has no weight model.layers.3.*some/base"):
        load_elements(tiny_model(layers=3), file)


def test_a_mask_alone_has_no_values(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    random_mask(tiny_model(), 0.1).save(path)
    with pytest.raises(UserError, match="use a file of trained elements"):
        load_elements(tiny_model(), path)
    with pytest.raises(UserError, match=r"use the elements.safetensors"):
        base_of(path)


def test_a_file_without_a_base_is_told(tmp_path: Path) -> None:
    path = tmp_path / "elements.safetensors"
    trained(torch.float32, path, about={})
    with pytest.raises(UserError, match="names no base model"):
        base_of(path)
