"""Without a package that it needs, a command says so in one line; `import agsel` raises an ImportError."""

from __future__ import annotations

from agsel.prerequisites import LIBRARY, REQUIREMENTS, MissingPackageError, require_installed

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY, environment

REFUSING = """
import os, sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name in os.environ["REFUSED"].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusing())
"""
"""A `sitecustomize.py`, which Python imports first."""


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (["launch/train.py"], "torch deepspeed"),
        (["launch/train.py"], "transformers"),
        (["-m", "agsel.train"], "deepspeed"),
        (["-m", "agsel.train"], "trl datasets"),
        (["-m", "agsel.evaluate"], "datasets"),
    ],
    ids=str,
)
def test_a_missing_package_is_named_in_one_line_with_the_command(
    command: list[str], package: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(REFUSING)
    env = environment() | {"REFUSED": package}
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    ended = subprocess.run([sys.executable, *command], env=env, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"agsel: error: not installed for {sys.executable}: {', '.join(package.split())}; ")
    for name in package.split():
        assert f"'{REQUIREMENTS[name]}'" in line
    assert "pip install " in line


def test_a_script_of_ones_own_can_catch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name in ("torch", "deepspeed"):
        monkeypatch.setitem(sys.modules, name, None)
    words = r"torch, deepspeed; pip install 'torch>=.*' && DS_BUILD_OPS=0 pip install --no-build-isolation 'deepspeed"
    with pytest.raises(ImportError, match=words):
        require_installed(["torch", "deepspeed"])
    assert issubclass(MissingPackageError, ImportError)


def test_the_table_is_that_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert list(REQUIREMENTS.values()) == project["dependencies"]
    assert {*LIBRARY} < {*REQUIREMENTS}
