"""The log of a rank, without a run: after an error, a fork or a crash, and where it cannot be written."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agsel.errors import UserError
from agsel.runs.rank_log import RankLog


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> RankLog:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    return RankLog()


def in_child(work: Callable[[], None]) -> int:
    """Do it in a process that is forked off. Returns its exit status."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_it_has_all_starts_with_what_was_printed_before_it_was_opened(log: RankLog, tmp_path: Path) -> None:
    def start(text: str) -> None:
        with log:
            log.write(text)
            log.open(tmp_path)
            in_child(lambda: log.write("of a worker\n"))
            raise RuntimeError("a bug")

    for text in ("first\n", "second\n"):
        with pytest.raises(RuntimeError, match="a bug"):
            start(text)
    lines = (tmp_path / "logs" / "rank-3.log").read_text().splitlines()
    assert [lines.count(line) for line in ("first", "second", "of a worker", "RuntimeError: a bug")] == [1, 1, 2, 2]
    began, ended = r"== began \S+, rank 3 of 4, host .*, pid \d+", r"== ended \S+, exit code 1"
    assert [bool(re.fullmatch(began, line)) for line in lines].count(True) == 2
    assert [bool(re.fullmatch(ended, line)) for line in lines].count(True) == 2
    assert re.fullmatch(ended, lines[-1])


def test_a_crash_leaves_the_stack_and_no_last_line(log: RankLog, tmp_path: Path) -> None:
    def crash() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        log.open(tmp_path)
        os.abort()

    assert os.WTERMSIG(in_child(crash)) == signal.SIGABRT
    text = (tmp_path / "logs" / "rank-3.log").read_text()
    assert "Fatal Python error: Aborted" in text
    assert "in crash" in text
    assert "== ended" not in text


def test_a_file_system_that_does_not_answer_keeps_no_rank_from_its_end(log: RankLog, tmp_path: Path) -> None:
    """As when the link is gone on which the run folder is, too: a pipe that is full stands for it."""
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "rank-3.log")
    reader = os.open(tmp_path / "logs" / "rank-3.log", os.O_RDONLY | os.O_NONBLOCK)
    begun = time.monotonic()
    with log:
        log.open(tmp_path)
        log.write("x" * 1_000_000)
    assert time.monotonic() - begun < 4
    os.close(reader)


def test_a_log_that_cannot_be_written_is_refused(log: RankLog, tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(UserError, match=r"cannot write the log of a rank, .*: make .*/logs writable"):
        log.open(tmp_path)
