"""Checkpoint folders of a real run, damaged in every way: noticed by name, passed over, never deleted for another."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from agsel.runs import checkpoints, resume
from agsel.runs.trainer import saved_step
from tests.distributed import REPOSITORY
from tests.test_launch import alone
from tests.tiny_run import TRAIN, save_model, save_rows, settings

STEPS = (2, 4, 6)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """The process group that saving and verifying need."""
    if dist.is_initialized():
        yield
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a run on one rank with three checkpoints."""
    parts = tmp_path_factory.mktemp("parts")
    model, rows = save_model(parts / "model"), save_rows(parts / "rows.jsonl", 16)
    result = alone(TRAIN, *settings(model, rows, parts / "run", save_strategy="steps", save_steps=2))
    assert result.returncode == 0, result.stderr[-6000:]
    return parts / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return shutil.copytree(finished, tmp_path / "run")


def steps_in(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("checkpoint-")) for folder in checkpoints.checkpoints_in(run)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    """One bit of it, the same one every time."""
    whole = bytearray(path.read_bytes())
    draw = random.Random(path.name)
    whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(whole)


@pytest.mark.parametrize("injure", [truncated, flipped, Path.unlink])
def test_whatever_file_is_damaged_is_named(run: Path, injure: Callable[[Path], None]) -> None:
    """Also that a resumption by name says so, and that `auto` would take the one before."""
    folder = run / "checkpoint-6"
    files = content(folder)
    assert {"latest", "trainer_state.json", "rng_state.pth", "manifest.json"} < set(files)
    assert len([name for name in files if name.startswith("global_step6/")]) == 2
    for name, whole in files.items():
        injure(folder / name)
        assert name in (checkpoints.damage(folder, None) or "whole")
        with pytest.raises(ValueError, match=name) as refusal:
            resume.find_checkpoint(str(folder), run, None)
        assert f"{folder} (--resume_from_checkpoint)" in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert resume.find_checkpoint("auto", run, None) == run / "checkpoint-4"
        (folder / name).write_bytes(whole)
        assert checkpoints.damage(folder, None) is None


def test_a_manifest_with_a_flipped_bit_is_no_manifest(run: Path) -> None:
    """Anywhere in it: what the run was like matters as much as what the files hold."""
    folder = run / "checkpoint-6"
    whole, saved = (folder / "manifest.json").read_bytes(), checkpoints.Manifest.read(folder)
    draw = random.Random(0)
    places = range(0, len(whole), 7)
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        (folder / "manifest.json").write_bytes(damaged)
        try:
            assert checkpoints.Manifest.read(folder) == saved, f"byte {place}"
        except ValueError:
            refused += 1
    assert refused > 0.9 * len(places), "the others do not change what it says"


@pytest.mark.parametrize("wanted", ["auto", "true"])
def test_a_damaged_newest_one_is_skipped_with_folder_and_reason(
    run: Path, wanted: str, caplog: pytest.LogCaptureFixture
) -> None:
    flipped(run / "checkpoint-6" / "rng_state.pth")
    truncated(run / "checkpoint-4" / "latest")
    with caplog.at_level(logging.WARNING, "agsel"):
        assert resume.find_checkpoint(wanted, run, None) == run / "checkpoint-2"
    assert [record.getMessage() for record in caplog.records] == [
        f"{run / 'checkpoint-6'} is skipped: rng_state.pth is not what was saved",
        f"{run / 'checkpoint-4'} is skipped: latest has 11 bytes instead of 12",
    ]


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def with_half_a_manifest(folder: Path) -> None:
    whole = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(whole[: len(whole) // 2])


def with_an_unsealed_manifest(folder: Path) -> None:
    fields = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({"run": fields["run"], "files": fields["files"]}))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("injure", [without_manifest, with_half_a_manifest, with_an_unsealed_manifest, empty])
def test_a_folder_that_was_never_completed_does_not_count(
    run: Path, injure: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = run / "checkpoint-6"
    injure(folder)
    assert resume.find_checkpoint("auto", run, None) == run / "checkpoint-4"
    assert f"{folder} is skipped: " in caplog.text
    assert "manifest.json" in caplog.text
    with pytest.raises(ValueError, match=r"manifest\.json"):
        resume.find_checkpoint(str(folder), run, None)


def test_a_run_folder_is_no_checkpoint(run: Path) -> None:
    with pytest.raises(ValueError, match=r"is a run folder: name one of its checkpoints, .*--output_dir"):
        resume.find_checkpoint(str(run), run, None)


def test_a_run_without_a_complete_checkpoint_starts_anew_or_says_so(run: Path) -> None:
    for step in STEPS:
        without_manifest(run / f"checkpoint-{step}")
    assert resume.find_checkpoint("auto", run, None) is None
    with pytest.raises(ValueError, match=f"^{run} holds no complete checkpoint.*--resume_from_checkpoint"):
        resume.find_checkpoint("true", run, None)
    assert resume.find_checkpoint("auto", run / "nowhere", None) is None


def test_what_is_staged_is_no_checkpoint(run: Path) -> None:
    """Neither for `auto` nor for rotation; the next start clears it."""
    shutil.copytree(run / "checkpoint-6", run / ".saving" / "checkpoint-8")
    with_half_a_manifest(shutil.copytree(run / "checkpoint-6", run / ".saving" / "checkpoint-10"))
    assert resume.find_checkpoint("auto", run, None) == run / "checkpoint-6"
    checkpoints.rotate(run, 3)
    assert steps_in(run) == [2, 4, 6]
    checkpoints.recover(run)
    assert not (run / ".saving").exists()
    assert steps_in(run) == [2, 4, 6]


@pytest.mark.parametrize(
    ("keep", "left"), [(None, [2, 4, 6]), (0, [2, 4, 6]), (-1, [2, 4, 6]), (3, [2, 4, 6]), (2, [4, 6]), (1, [6])]
)
def test_rotation_keeps_the_newest(run: Path, keep: int | None, left: list[int]) -> None:
    checkpoints.rotate(run, keep)
    assert steps_in(run) == left
    assert not (run / ".saving").exists()


@pytest.mark.parametrize("injure", [without_manifest, with_half_a_manifest, empty])
@pytest.mark.parametrize(("keep", "left"), [(1, [4, 6]), (2, [2, 4, 6])])
def test_incomplete_checkpoints_neither_count_nor_go(
    run: Path, keep: int, left: list[int], injure: Callable[[Path], None]
) -> None:
    injure(run / "checkpoint-6")
    checkpoints.rotate(run, keep)
    assert steps_in(run) == left


def test_the_only_complete_checkpoint_stays(run: Path) -> None:
    for step in (2, 6):
        truncated(run / f"checkpoint-{step}" / "latest")
    checkpoints.rotate(run, 1)
    assert steps_in(run) == [2, 4, 6]


def test_rotation_keeps_the_best_and_the_one_just_saved(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever path they are known. The one just saved is old if the run was resumed from before others."""
    monkeypatch.chdir(run)
    checkpoints.rotate(run, 1, Path("checkpoint-2"), run / "checkpoint-4")
    assert steps_in(run) == [2, 4, 6]
    checkpoints.rotate(run, 1, Path("checkpoint-2"))
    assert steps_in(run) == [2, 6]


def test_what_a_run_does_once_more_is_set_aside(run: Path) -> None:
    """Every time; or a run that stops before it has come as far would go on from there."""
    before = content(run / "checkpoint-6")
    assert checkpoints.set_aside_later(run, saved_step(run / "checkpoint-6")) is None
    said = checkpoints.set_aside_later(run, saved_step(run / "checkpoint-2"))
    assert said == "checkpoint-4, checkpoint-6: of what came after step 2 before, moved into abandoned-1/"
    assert resume.find_checkpoint("auto", run, None) == run / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-4")
    said = checkpoints.set_aside_later(run, saved_step(run / "checkpoint-2"))
    assert said == "checkpoint-4: of what came after step 2 before, moved into abandoned-2/"
    assert content(run / "abandoned-1" / "checkpoint-6") == before


def test_saving_a_step_again_replaces_it(run: Path) -> None:
    truncated(run / "checkpoint-4" / "latest")
    with checkpoints.saving(run, 4, {"seed": 1}, None) as staged:
        (staged / "part").mkdir()
        (staged / "part" / "weights").write_bytes(b"new")
    assert set(content(run / "checkpoint-4")) == {"part/weights", "manifest.json"}
    assert checkpoints.damage(run / "checkpoint-4", None) is None
    assert checkpoints.Manifest.read(run / "checkpoint-4").run == {"seed": 1}
    assert steps_in(run) == [2, 4, 6]
    assert not (run / ".saving").exists()


def test_killed_at_any_moment_of_a_save_a_run_keeps_whole_checkpoints(tmp_path: Path) -> None:
    """At every single operation on the run folder: step 4 is saved again, then step 6, then rotated to one."""
    worker = alone(REPOSITORY / "tests" / "killed_save_worker.py", tmp_path)
    assert worker.returncode == 0, worker.stderr[-6000:]
    killed = sorted(tmp_path.glob("killed-*"))[:-1]
    between_the_renames = {"old-checkpoint-4", "checkpoint-4"}
    interrupted = [{path.name for path in (run / ".saving").glob("*")} for run in killed if 4 not in steps_in(run)]
    assert between_the_renames in interrupted
    seen = [what_is_left(run) for run in killed]
    assert seen == sorted(seen, key=ORDER.index), "never back"
    assert set(seen) == set(ORDER), "and every one of them was there to be seen"


ORDER = ["2 old, 4 old", "2 old, 4 new", "2 old, 4 new, 6 new", "4 new, 6 new", "6 new"]


def what_is_left(run: Path) -> str:
    """After the next start; every checkpoint is whole."""
    checkpoints.recover(run)
    assert not (run / ".saving").exists()
    for folder in checkpoints.checkpoints_in(run):
        assert checkpoints.damage(folder, None) is None
    return ", ".join(f"{step} {(run / f'checkpoint-{step}' / 'weights').read_text()}" for step in steps_in(run))
