"""The mask of a run folder is taken again only if a new choice would be the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from agsel.elements import ElementMask
from agsel.training.chosen_elements import FILE, _describe, _kept
from agsel.training.configuration import configure
from agsel.training.settings import read_settings
from tests.tiny import random_mask, tiny_model
from tests.tiny_run import settings

pytestmark = pytest.mark.usefixtures("untouched_environment")


def describe(folder: Path, **changed: object) -> dict[str, Any]:
    given = {"elements": "gallop", "select_fraction": None, "method": "full"} | changed
    trainer: Any = SimpleNamespace(model=tiny_model(), train_dataset=Dataset.from_dict({"input_ids": [[1, 2, 3]]}))
    words = settings(folder, folder, folder, **given)
    return _describe(trainer, configure(read_settings(words, {"deepspeed": "zero2", "use_cpu": True, "dtype": None})))


def test_other_settings_choose_anew(tmp_path: Path) -> None:
    mask = random_mask(tiny_model(), 0.1)
    ElementMask(mask.indices, mask.shapes, describe(tmp_path)).save(tmp_path / FILE)
    kept = _kept(tmp_path / FILE, describe(tmp_path))
    assert kept is not None
    assert kept.checksum == mask.checksum
    for name, value in {"loss_type": "dft", "label_smoothing_factor": 0.1, "elements": "saft", "seed": 1}.items():
        assert _kept(tmp_path / FILE, describe(tmp_path, **{name: value})) is None, name


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_damaged_mask_is_chosen_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert _kept(tmp_path / FILE, describe(tmp_path)) is None
