"""Runs on two ranks that are killed, run out of disk, diverge, or find a damaged checkpoint: what is left, and said."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from agsel.monitor.history import METRICS, SELECTION, read_lines
from agsel.runs import checkpoints
from agsel.runs.checkpoints import Manifest
from tests.distributed import REPOSITORY, environment, free_port, kill_session, launch, remove_shared_memory, run_ranks
from tests.test_launch import alone, said, weights
from tests.tiny_run import TRAIN, save_model, save_rows, settings

AUTO = {"resume_from_checkpoint": "auto"}
PAGE = 4096


@dataclass(frozen=True)
class Moment:
    """So many seconds after the beginning of the n-th save of a launch, or of its ranks if `save` is 0."""

    save: int
    seconds: float


class Launch:
    """`launch/train.py` on two ranks, to be watched and shot at.

    Args:
        arguments: its settings.
        run: its run folder.
    """

    def __init__(self, arguments: list[str], run: Path) -> None:
        self._run = run
        self._port = free_port()
        self._log = run.with_name(f"{run.name}-{self._port}.log")
        deepspeed = shutil.which("deepspeed", path=environment()["PATH"])
        command = [str(deepspeed), "--num_gpus", "2", "--master_port", str(self._port), str(TRAIN), *arguments]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment(), cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, rank: int, moment: Moment) -> None:
        """Kill a rank then."""
        victim = self._wait_for_ranks()[rank]
        self._wait_for_save(moment.save)
        time.sleep(moment.seconds)
        victim.kill()

    def end(self) -> tuple[int, str]:
        """Exit code and output, once the launcher has ended; nothing that it started may be left."""
        try:
            code = self._process.wait(timeout=120)
            assert not processes_of(self._process.pid), "the launcher has left processes behind"
        finally:
            kill_session(self._process.pid)
            remove_shared_memory(self._port)
        return code, self._log.read_text()

    def _wait_for_ranks(self) -> dict[int, psutil.Process]:
        while len(found := self._ranks()) < 2:
            self._require_running()
            time.sleep(0.01)
        return found

    def _wait_for_save(self, number: int) -> None:
        seen: set[str] = set()
        while len(seen) < number:
            self._require_running()
            seen |= set(interrupted_save(self._run))
            time.sleep(0.001)

    def _require_running(self) -> None:
        assert self._process.poll() is None, self._log.read_text()[-6000:]

    def _ranks(self) -> dict[int, psutil.Process]:
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                if str(TRAIN) in process.cmdline()[:3]:
                    found[int(process.environ()["RANK"])] = process
        return found


def processes_of(leader: int) -> list[str]:
    """Command lines of the processes of a session."""
    listed = subprocess.run(["ps", "-o", "args=", "-s", str(leader)], capture_output=True, text=True)
    return listed.stdout.splitlines()


def interrupted_save(run: Path) -> list[str]:
    """The checkpoint that is being written, or was when the ranks ended."""
    try:
        names = os.listdir(run / checkpoints.STAGING)
    except FileNotFoundError:  # between two saves
        return []
    return [name for name in names if name.startswith(checkpoints.PREFIX)]


def flip(path: Path) -> None:
    """One bit in the middle of it."""
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def saving_run(parts: tuple[Path, Path], run: Path, steps: int, every: int, **changed: object) -> list[str]:
    often = {"max_steps": steps, "save_strategy": "steps", "save_steps": every, "logging_steps": every}
    return settings(*parts, run, **often | changed)


def unbroken(parts: tuple[Path, Path], run: Path, *, steps: int, every: int, **changed: object) -> Path:
    run_ranks(TRAIN, *saving_run(parts, run, steps, every, **changed), timeout=900)
    return run


def run_until_killed(arguments: list[str], run: Path, rank: int, moment: Moment) -> str:
    """Start or go on, be killed; every checkpoint that is there is whole."""
    launched = Launch(arguments, run)
    try:
        launched.kill(rank, moment)
    finally:
        code, output = launched.end()
    assert code != 0, output[-6000:]
    for folder in checkpoints.checkpoints_in(run):
        assert checkpoints.missing_part(folder) is None
    return output


def went_on_from(output: str, run: Path) -> int:
    """The step that a run with `auto` said that it went on from, 0 for the beginning."""
    (line,) = [line for line in output.splitlines() if line.startswith("resume ")]
    if line == f"resume    {run} holds no complete checkpoint: from the beginning":
        return 0
    folder, verified = line.removeprefix("resume    ").split(", ")
    assert verified == "every file verified"
    return int(Path(folder).name.removeprefix("checkpoint-"))


def steps_of(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("checkpoint-")) for folder in checkpoints.checkpoints_in(run)]


def newest_step(run: Path) -> int:
    return max(steps_of(run), default=0)


def learnt(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(run / METRICS)]


def chosen(run: Path) -> list[dict[str, object]]:
    return [line | {"seconds": None} for line in read_lines(run / SELECTION)]


def require_equal_results(one: Path, other: Path) -> None:
    assert weights(one).keys() == weights(other).keys()
    for name, weight in weights(one).items():
        assert torch.equal(weight, weights(other)[name]), name
    assert (one / "selection.json").read_text() == (other / "selection.json").read_text()
    assert chosen(one) == chosen(other)
    assert learnt(one) == learnt(other)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a data file."""
    folder = tmp_path_factory.mktemp("parts")
    return save_model(folder / "model"), save_rows(folder / "rows.jsonl", 32)


@pytest.fixture(scope="module")
def whole(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 28 unbroken steps, with a checkpoint after every fourth."""
    return unbroken(parts, tmp_path_factory.mktemp("whole"), steps=28, every=4)


def test_a_run_killed_twice_and_robbed_of_its_newest_checkpoint_ends_as_the_unbroken_one(
    parts: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    print("seed", seed)
    run = tmp_path / "run"
    arguments = saving_run(parts, run, steps=28, every=4, **AUTO)
    output = run_until_killed(arguments, run, draw.randrange(2), Moment(2, draw.uniform(0, 0.5)))
    assert went_on_from(output, run) == 0
    before = newest_step(run)
    assert before >= 4
    output = run_until_killed(arguments, run, draw.randrange(2), Moment(2, 0))
    assert went_on_from(output, run) == before
    assert interrupted_save(run), "the second kill was during a save"
    before, newest = steps_of(run)[-2], checkpoints.checkpoints_in(run)[-1]
    flip(newest / "model.safetensors")
    result = launch(TRAIN, *arguments)
    assert result.returncode == 0, result.stdout[-6000:]
    assert result.stdout.count(f"{newest} is skipped: model.safetensors is not what was saved") == 1
    assert went_on_from(result.stdout, run) == before
    require_equal_results(run, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_twenty_times_ends_as_the_unbroken_one(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Eight kills are aimed at a save, six anywhere between saves, six at the start; three checkpoints are kept."""
    seed = random.randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    moments = [Moment(draw.randint(1, 4), draw.uniform(0, 0.03)) for _ in range(8)]
    moments += [Moment(draw.randint(1, 4), draw.uniform(0, 2)) for _ in range(6)]
    moments += [Moment(0, draw.uniform(0, 12)) for _ in range(6)]
    draw.shuffle(moments)
    run, length = tmp_path / "run", {"steps": 1500, "every": 5, "save_total_limit": 3}
    arguments, during_a_save = saving_run(parts, run, **length, **AUTO), 0
    for moment in moments:
        newest, rank = newest_step(run), draw.randrange(2)
        print("newest checkpoint", newest, "rank", rank, moment, flush=True)
        output = run_until_killed(arguments, run, rank, moment)
        if "\nresume " in output:
            assert went_on_from(output, run) == newest
        assert newest_step(run) >= newest
        during_a_save += bool(interrupted_save(run))
    assert during_a_save >= 5
    newest = newest_step(run)
    result = launch(TRAIN, *arguments, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:]
    assert went_on_from(result.stdout, run) == newest > 0
    require_equal_results(run, unbroken(parts, tmp_path / "whole", **length))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; the test says how large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def space_of(folder: Path) -> int:
    """Bytes that its files take on a disk of pages."""
    return sum(math.ceil(path.stat().st_size / PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("fitting", [1.6, *(pytest.param(size, marks=pytest.mark.slow) for size in (1.1, 1.3, 1.9))])
def test_a_disk_that_fills_during_a_save_leaves_the_checkpoint_before(
    parts: tuple[Path, Path], whole: Path, small_disk: Path, fitting: float
) -> None:
    """The second checkpoint does not fit. Whatever it is that does not, and on whichever rank, it is said alike."""
    run = small_disk / "run"
    resize(small_disk, round(fitting * space_of(whole / "checkpoint-4")))
    arguments = saving_run(parts, run, steps=28, every=4, **AUTO)
    result = launch(TRAIN, *arguments)
    assert result.returncode != 0
    (line,) = said(result.stdout)
    assert f"the checkpoint of step 8 could not be written to {run} (No space left on device; " in line
    assert f"the last good checkpoint is {run / 'checkpoint-4'}:" in line
    assert "(--output_dir), then resume" in line
    assert "Traceback" not in result.stdout, result.stdout
    assert steps_of(run) == [4]
    assert checkpoints.missing_part(run / "checkpoint-4") is None
    kept = Manifest.read(run / "checkpoint-4").files
    assert digests(run / "checkpoint-4") == kept
    if fitting == 1.9:
        resize(small_disk, 100 * space_of(whole / "checkpoint-4"))
        result = launch(TRAIN, *arguments)
        assert result.returncode == 0, result.stdout[-6000:]
        assert went_on_from(result.stdout, run) == 4
        require_equal_results(run, whole)


def digests(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of its files but the manifest."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del files[checkpoints.MANIFEST]
    return {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}


def test_a_run_that_diverges_names_the_last_good_checkpoint(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """The first step of a warmup has learning rate 0: only its weights are good, though those of step 2 are finite.

    Rotation would keep one checkpoint; the good one is another than the newest.
    """
    run = tmp_path / "run"
    changed = {"learning_rate": 1e20, "warmup_steps": 2, "max_skipped_steps": 3, "save_total_limit": 1}
    result = alone(TRAIN, *saving_run(parts, run, steps=20, every=1, **changed))
    assert result.returncode != 0
    (line,) = said(result.stderr)
    assert "3 steps in a row had a non-finite gradient (max_skipped_steps)" in line
    assert line.endswith(f"the last good checkpoint is {run / 'checkpoint-1'}")
    assert "Traceback" not in result.stderr, result.stderr
    assert steps_of(run) == [1, 2]
    assert checkpoints.missing_part(run / "checkpoint-1") is None
    before, good = load_file(parts[0] / "model.safetensors"), load_file(run / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(before[name], weight) for name, weight in good.items())


@pytest.mark.slow
def test_a_run_that_never_had_a_good_checkpoint_says_so(parts: tuple[Path, Path], tmp_path: Path) -> None:
    changed = {"learning_rate": 1e20, "max_skipped_steps": 3}
    result = launch(TRAIN, *saving_run(parts, tmp_path / "run", steps=20, every=1, **changed))
    assert result.returncode != 0
    (line,) = said(result.stdout)
    assert line.endswith("there is no good checkpoint")
    assert "Traceback" not in result.stdout, result.stdout


def test_a_damaged_checkpoint_that_was_named_is_refused(parts: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(whole / "checkpoint-28", tmp_path / "checkpoint-28")
    victim = next(damaged.glob("*/*rank_1*optim_states.pt"))
    flip(victim)
    named = {"resume_from_checkpoint": damaged}
    result = launch(TRAIN, *saving_run(parts, tmp_path / "run", steps=80, every=4, **named))
    assert result.returncode != 0
    (line,) = said(result.stdout)
    assert f"cannot resume from {damaged} (--resume_from_checkpoint): " in line
    assert f"{victim.relative_to(damaged)} is not what was saved; use another checkpoint, or auto" in line
    assert "Traceback" not in result.stdout, result.stdout
    assert "stopped   " not in result.stdout, "the launcher ends the other rank, nobody else has asked for a stop"
