"""The model card: what it says of unusual runs, and that nothing secret is in the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from agsel.monitor import SelectionHistory
from agsel.training import environment
from agsel.training.card import Run, card_data, write_card, write_guide
from agsel.training.environment import describe_environment

SETTINGS: dict[str, Any] = {
    "model_name_or_path": "some/model",
    "dataset_name": "some/rows",
    "dataset_train_split": "train",
    "dataset_config": None,
    "datasets": None,
    "method": "lisa",
}


def card_of(folder: Path, compared: dict[str, Any] | None = None, **changed: Any) -> str:
    (folder / "model").mkdir(parents=True)
    result = {"steps": 3, "loss": 1.5, "eval_loss": None, "train_seconds": 61.0}
    history = SelectionHistory(("layers.0",))
    history.add(1, "exploit", ["layers.0"], {})
    about = Run(SETTINGS | changed, compared or {}, result, history, {"layers.0": 7}, describe_environment(1))
    write_card(folder / "model", about)
    return ModelCard.load(folder / "model" / "README.md").content


def test_model_and_data_are_links_to_their_pages(tmp_path: Path) -> None:
    text = card_of(tmp_path / "run")
    assert "[some/model](https://huggingface.co/some/model) on " in text
    assert "[some/rows](https://huggingface.co/datasets/some/rows) with " in text
    assert "| time | 0:01:01 |" in text
    assert "layers 0 █, 7 to 7 times each" in text, "also where the history knows fewer"
    assert "None" not in text


def test_a_mixture_names_its_parts(tmp_path: Path) -> None:
    """As JSON, as it is on a command line, and as a mapping, as it is in a file."""
    path = tmp_path / "own.jsonl"
    path.touch()
    parts = ['{"path": "some/rows"}', {"path": str(path)}, {"path": "json", "data_files": "a.json"}]
    text = card_of(tmp_path / "run", dataset_name=None, datasets=parts)
    assert "on [some/rows](https://huggingface.co/datasets/some/rows), `own.jsonl`, json files with" in text
    assert card_data(SETTINGS | {"dataset_name": None, "datasets": parts}).datasets == ["some/rows"]
    assert "None" not in text
    assert str(tmp_path) not in text


def test_a_bar_in_a_name_ends_no_cell(tmp_path: Path) -> None:
    assert r"| seed | a\|b c |" in card_of(tmp_path / "run", {"seed": "a|b\nc"})


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# Model\n", "mit"),
        ("---\nlicense: [\n---\n", None),
        ("---\n- no\n- mapping\n---\n", None),
        ("---\nlicense:\n- a\n- b\n---\n", None),
        ("no data\n", None),
    ],
)
def test_the_licence_is_that_of_the_base_if_its_card_can_be_read(tmp_path: Path, card: str, licence: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert card_data(SETTINGS | {"model_name_or_path": str(tmp_path)}).license == licence


def test_the_command_is_told_without_tokens() -> None:
    words = ["train.py", "--hub_token", "one", "--hub-token", "two", "--hub_token=three", "--hub-token=four\nfive"]
    words += ["--seed", "3", "--eos_token", "<end>", "--method=x"]
    said = environment._without_secrets(words)
    assert said[:2] == ["train.py", "--hub_token"]
    assert not {"one", "two", "three", "four"} & {part for word in said for part in word.split("=")}
    assert [word for word in said if word == "***"] == ["***"] * 3
    assert said[-1] == "--method=x"


def test_a_guide_takes_the_place_of_a_guide_alone(tmp_path: Path) -> None:
    write_guide(tmp_path, has_report=False)
    write_guide(tmp_path, has_report=True)
    assert "report.html" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# My project\n")
    write_guide(tmp_path, has_report=True)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    write_guide(tmp_path, has_report=True)
    assert (tmp_path / "README.md").is_dir()
