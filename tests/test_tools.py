"""What all commands of tools/ have in common."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module

import pytest

from tests.distributed import REPOSITORY

NO_COMMANDS = ("tools.bench.measured_ranks", "tools.comparison.method_rates")
"""A program of ranks, and a parser of what follows a colon."""
COMMANDS = sorted(
    name
    for path in (REPOSITORY / "tools").rglob("*.py")
    if "ArgumentParser(" in path.read_text()
    and (name := ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)) not in NO_COMMANDS
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_flag_that_is_not_there_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    command = import_module(name)
    words = ["--nonsense"]
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as end:
        command.main(*[words] * len(inspect.signature(command.main).parameters))
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
