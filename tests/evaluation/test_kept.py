"""Results of an evaluation on disk: those of finished units survive a kill at any byte, others never come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from agsel.evaluation.kept import KeptResults

FOUND = [[{"loss": 0.1 + 0.2, "completion_tokens": 3}], [{"generated": "sieben ✓\u2028", "correct": False}], [{}, {}]]


def keep(folder: Path) -> KeptResults:
    kept = KeptResults(folder, {"model": "a"})
    assert kept.begin() == {}
    for unit, results in enumerate(FOUND):
        kept.add(unit % 2, unit, results)
    return kept


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    keep(tmp_path / "parts")
    for _ in range(2):
        assert KeptResults(tmp_path / "parts", {"model": "a"}).begin() == dict(enumerate(FOUND))


def test_a_cut_line_is_lost_and_nothing_else(tmp_path: Path) -> None:
    """Whatever byte is the last; and what comes after it is whole again."""
    keep(tmp_path / "parts")
    file = tmp_path / "parts" / "rank-0.jsonl"
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole)):
        keep(tmp_path / str(size))
        (tmp_path / str(size) / "rank-0.jsonl").write_bytes(whole[:size])
        kept = KeptResults(tmp_path / str(size), {"model": "a"})
        expected = {1: FOUND[1]} | ({0: FOUND[0]} if size >= first else {})
        assert kept.begin() == expected
        kept.add(0, 2, FOUND[2])
        assert KeptResults(tmp_path / str(size), {"model": "a"}).begin() == expected | {2: FOUND[2]}


def test_results_of_another_evaluation_are_removed(tmp_path: Path) -> None:
    keep(tmp_path / "parts")
    assert KeptResults(tmp_path / "parts", {"model": "b"}).begin() == {}
    assert KeptResults(tmp_path / "parts", {"model": "a"}).begin() == {}


def test_nothing_is_left_at_the_end(tmp_path: Path) -> None:
    keep(tmp_path / "parts").end()
    assert not (tmp_path / "parts").exists()


def test_a_folder_with_files_of_others_is_not_removed(tmp_path: Path) -> None:
    keep(tmp_path / "parts")
    (tmp_path / "parts" / "novel.txt").touch()
    with pytest.raises(ValueError, match=r"holds novel.txt: choose another --output"):
        KeptResults(tmp_path / "parts", {"model": "a"}).begin()
    assert (tmp_path / "parts" / "novel.txt").exists()


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output"):
        KeptResults(tmp_path / "file" / "parts", {}).begin()
