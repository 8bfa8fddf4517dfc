"""Progress of what is long: lines where there is no terminal, and only then, from one process."""

from __future__ import annotations

import itertools
import time

import pytest

from agsel.monitor.progress import SECONDS_BETWEEN_LINES, Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds pass between two looks."""
    seconds = itertools.count(0, 2)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))


@pytest.mark.usefixtures("clock")
def test_a_line_now_and_then_says_how_much_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("judging", 8) as progress:
        for _ in range(8):
            progress.advance(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["judging 38%, 0:00:10 left", "judging 75%, 0:00:04 left"]
    assert SECONDS_BETWEEN_LINES == 5


@pytest.mark.usefixtures("clock")
def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("judging", 8, shown=False) as progress:
        for _ in range(8):
            progress.advance(1)
    assert capsys.readouterr() == ("", "")


def test_what_is_short_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("judging", 2) as progress:
        progress.advance(2)
    assert capsys.readouterr() == ("", "")


def test_hours_are_shown_as_such() -> None:
    progress = Progress("judging", 100)
    progress.advance(1)
    assert progress.describe(60) == "judging 1%, 1:39:00 left"
