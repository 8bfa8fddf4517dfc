"""One run at a time in a run folder: who gets it, who is refused, and what a run does that has lost it.

The processes are forked off this one, which saves them the seconds that it takes to import torch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from agsel.errors import UserError
from agsel.runs import claim
from agsel.runs.address import Address
from agsel.runs.claim import LOCK, Claim, Owner, claimed, take

FORK = multiprocessing.get_context("fork")
ELSEWHERE = Address("elsewhere", 1, "another boot", 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    assert claim.BEAT * 5 < claim.SILENCE < 30
    for name, seconds in {"BEAT": 0.1, "SILENCE": 1.0, "PATIENCE": 0.5}.items():
        monkeypatch.setattr(claim, name, seconds)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / LOCK


@contextmanager
def process(work: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """A process that is killed at the end."""
    started = FORK.Process(target=work, args=arguments)
    started.start()
    try:
        yield started
    finally:
        started.kill()
        started.join()


def hold(folder: Path) -> None:
    Claim(folder, take(folder))
    time.sleep(60)


def wait_for(happened: Callable[[], object]) -> None:
    until = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def name_of(lock: Path) -> str | None:
    owner = Owner.read(lock)
    return None if owner is None else owner.word


def test_a_folder_in_use_is_refused_and_that_of_a_killed_run_taken_over_at_once(lock: Path) -> None:
    with process(hold, lock.parent) as holder:
        wait_for(lambda: name_of(lock))
        with pytest.raises(UserError, match=rf"in use by the run of host {socket.gethostname()}, pid {holder.pid}:"):
            take(lock.parent)
    start = time.monotonic()
    assert take(lock.parent).address == Address.own()
    assert time.monotonic() - start < 0.5


def test_a_number_that_was_given_to_another_process_is_not_the_killed_run(lock: Path) -> None:
    Owner(replace(Address.own(), started=Address.own().started - 1), "earlier").create(lock)
    assert name_of(lock) == "earlier"
    assert take(lock.parent).word != "earlier"


def test_a_run_of_another_host_is_refused_while_it_gives_signs_of_life(lock: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(claim, "SILENCE", 10.0)
    Owner(ELSEWHERE, "theirs").create(lock)
    alive = threading.Event()

    def live() -> None:
        while not alive.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by the run of host elsewhere, pid 1: choose another folder"):
            take(lock.parent)
    finally:
        alive.set()
        thread.join()
    assert name_of(lock) == "theirs"


@pytest.mark.parametrize("content", ["", json.dumps({"address": asdict(ELSEWHERE), "word": "theirs"})])
def test_a_silent_run_of_another_host_is_taken_over(
    content: str, lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that was killed before it wrote its name."""
    lock.write_text(content)
    start = time.monotonic()
    assert take(lock.parent).word == name_of(lock)
    assert claim.SILENCE <= time.monotonic() - start < claim.SILENCE + 2
    assert capsys.readouterr().out.startswith(f"waiting   {lock} is of ")
    assert [path.name for path in lock.parent.iterdir()] == [LOCK]


def test_of_many_that_take_over_at_once_one_succeeds(lock: Path) -> None:
    Owner(replace(Address.own(), started=0), "killed").create(lock)
    gate, outcomes = FORK.Barrier(12), FORK.Queue()

    def run() -> None:
        gate.wait()
        try:
            outcomes.put(take(lock.parent).word)
        except UserError:
            outcomes.put(None)
        gate.wait()

    contenders = [FORK.Process(target=run) for _ in range(12)]
    for contender in contenders:
        contender.start()
    winners = [word for word in (outcomes.get(timeout=30) for _ in contenders) if word is not None]
    for contender in contenders:
        contender.join()
    assert winners == [name_of(lock)]


def test_the_lock_lives_is_made_anew_and_goes_with_its_run(lock: Path) -> None:
    kept = Claim(lock.parent, take(lock.parent))
    word, first = name_of(lock), lock.stat().st_mtime_ns
    wait_for(lambda: lock.stat().st_mtime_ns != first)
    lock.unlink()
    wait_for(lambda: name_of(lock) == word)
    kept.release()
    assert not lock.exists()


def test_a_run_that_has_lost_its_folder_ends(lock: Path, tmp_path: Path) -> None:
    """As after its host was suspended for longer than the others wait."""

    def run() -> None:
        sys.stderr = (tmp_path / "said").open("w")
        hold(lock.parent)

    with process(run) as loser:
        wait_for(lambda: name_of(lock))
        lock.unlink()
        Owner(ELSEWHERE, "theirs").create(lock)
        loser.join(10)
        assert loser.exitcode == 1
    assert "agsel: error: the run of host elsewhere, pid 1 has taken over" in (tmp_path / "said").read_text()
    assert name_of(lock) == "theirs"


def test_a_folder_that_one_rank_does_not_see_is_refused_on_all(tmp_path: Path) -> None:
    """Two ranks in two folders stand for two hosts with a disk of their own."""
    outcomes = FORK.Queue()

    def run(rank: int) -> None:
        os.chdir(tmp_path / str(rank))
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        try:
            with claimed(Path("run"), dist.group.WORLD):
                outcomes.put("entered")
        except UserError as error:
            outcomes.put(str(error))

    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    ranks = [FORK.Process(target=run, args=(rank,)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    said = {outcomes.get(timeout=60) for _ in ranks}
    for process in ranks:
        process.join()
    here = socket.gethostname()
    expected = f"rank 1 on host {here} does not see the run folder {tmp_path / '1' / 'run'} that rank 0 on host {here}"
    assert [expected in text and "(--output_dir)" in text for text in said]
    assert not (tmp_path / "0" / "run" / LOCK).exists()
