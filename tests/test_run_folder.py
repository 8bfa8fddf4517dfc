"""What a run refuses to overwrite, and what it goes on in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from agsel.errors import UserError
from agsel.runs import folder
from agsel.runs.checkpoints import MANIFEST, checkpoints_in

ALL = {"merge_adapter": True, "elements": "gallop", "report": True}
"""Settings of a run that leaves all that there is."""
NAMES = (*folder.WRITTEN, *folder.outputs_of(ALL))


def with_files(run: Path, names: Sequence[str]) -> Path:
    for name in names:
        path = run / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine\n")
    return run


def of_run(run: Path, settings: dict[str, Any], names: Sequence[str] = ()) -> Path:
    with_files(run, names)
    run.mkdir(exist_ok=True)
    (run / folder.SETTINGS).write_text(folder.ABOUT_SETTINGS + yaml.safe_dump(settings))
    return run


def refusal(run: Path, settings: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        folder.require_no_files_of_others(run, folder.outputs_of(settings))
    return str(refused.value)


def accept(run: Path, settings: dict[str, Any]) -> None:
    folder.require_no_files_of_others(run, folder.outputs_of(settings))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_writes_is_refused_where_it_is_of_no_run(tmp_path: Path, name: str) -> None:
    assert f"holds {name}, which is of no run and would be overwritten" in refusal(with_files(tmp_path, [name]), ALL)


@pytest.mark.parametrize("name", folder.outputs_of(ALL)[1:])
def test_what_this_run_does_not_write_stays(tmp_path: Path, name: str) -> None:
    accept(with_files(tmp_path, [name]), {})


@pytest.mark.parametrize("name", folder.outputs_of(ALL)[1:])
def test_what_the_run_before_did_not_write_is_of_others(tmp_path: Path, name: str) -> None:
    run = of_run(tmp_path / "run", {"merge_adapter": False, "elements": None, "report": False}, [name, "result.json"])
    assert f"holds {name}, which is of no run" in refusal(run, ALL)


def test_a_run_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    accept(of_run(tmp_path / "run", ALL, [name for name in NAMES if name != folder.SETTINGS]), ALL)


def test_a_run_with_checkpoints_goes_on_without_its_settings(tmp_path: Path) -> None:
    """Which a host that stopped may have left empty."""
    run = with_files(tmp_path, [name for name in NAMES if name != folder.SETTINGS])
    (run / folder.SETTINGS).write_text("")
    assert "holds config.yaml, which is of no run" in refusal(run, ALL)
    with_files(run, [f"checkpoint-3/{MANIFEST}"])
    accept(run, ALL)


def test_checkpoints_of_another_trainer_are_of_no_run(tmp_path: Path) -> None:
    run = with_files(tmp_path, ["checkpoint-3/model.safetensors"])
    assert "holds checkpoint-3, which is of no run" in refusal(run, {})


@pytest.mark.parametrize("name", folder.outputs_of(ALL))
def test_what_the_run_cannot_replace_is_refused_at_its_start(tmp_path: Path, name: str) -> None:
    run, other = of_run(tmp_path / "run", ALL), tmp_path / "elsewhere"
    kind = "folder" if name.endswith("/") else "file"
    (run / name).symlink_to(other)
    assert f"{name.removesuffix('/')} is no {kind}, which the run has to write there" in refusal(run, ALL)
    (run / name).unlink()
    with_files(run, [name.removesuffix("/") if kind == "folder" else f"{name}/"])
    assert f"{name.removesuffix('/')} is no {kind}, which the run has to write there" in refusal(run, ALL)


def test_a_new_run_does_not_take_the_place_of_what_an_earlier_one_left(tmp_path: Path) -> None:
    run = of_run(tmp_path / "run", ALL, ["model/", "merged/", "elements.safetensors"])
    with pytest.raises(UserError, match=r"holds model/ and merged/ and elements\.safetensors of an earlier run"):
        folder.require_no_earlier_run(run)
    (run / "model").rmdir()
    with pytest.raises(UserError, match=r"holds merged/ and elements\.safetensors of an earlier run: choose"):
        folder.require_no_earlier_run(run)


def test_a_run_that_left_nothing_is_begun_again(tmp_path: Path) -> None:
    run = of_run(tmp_path / "run", ALL, ["metrics.jsonl", "environment.json", "report.html"])
    folder.require_no_earlier_run(run)
    accept(run, ALL)


def test_only_numbers_name_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best", "checkpoint-\u00b2"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
