"""The wheel holds all that a run needs: it is built, unpacked into an empty folder, and trains from there."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY, environment
from tests.tiny_run import save_model, save_rows, settings


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git knows, so that what lies around in the clone does not help."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "clone" / name).write_bytes((REPOSITORY / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, folder / "clone"], check=True, capture_output=True)
    (built,) = folder.glob("agsel-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def outside(installed: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module of the installed package in a folder that is no clone."""
    env = environment() | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


def test_everything_that_the_package_reads_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "agsel").rglob("*") if path.is_file()}
    here = {name for name in here if "__pycache__" not in name}
    assert here <= names
    for folder, kind in {"ds_configs": "ds_configs", "launch/recipes": "recipes"}.items():
        for path in (REPOSITORY / folder).iterdir():
            assert f"agsel/{kind}/{path.name}" in names
    outside_package = {name for name in names if not name.startswith(("agsel/", "agsel-"))}
    assert outside_package == set(), "nothing else is installed"


def test_it_trains_and_evaluates_without_the_clone(installed: Path, tmp_path: Path) -> None:
    """With a recipe and a DeepSpeed configuration by name."""
    model, rows = save_model(tmp_path / "model"), save_rows(tmp_path / "rows.jsonl", 8)
    changed = {"config": "demo", "deepspeed": "zero3", "max_steps": 2, "per_device_train_batch_size": 2}
    changed |= {"warmup_steps": 0}
    result = outside(installed, tmp_path, "agsel.train", *settings(model, rows, tmp_path / "run", **changed))
    assert result.returncode == 0, result.stderr[-6000:]
    assert "engine    ZeRO-3" in result.stdout
    report = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert (report["draw"], report["steps"]) == ("sample", 2), "as the recipe says"
    judged = ["--model", tmp_path / "run" / "model", "--dataset", rows, "--skip_generation"]
    fields = ["--prompt_field", "question", "--completion_field", "answer", "--completion_template", " {answer}"]
    result = outside(installed, tmp_path, "agsel.evaluate", *judged, *fields)
    assert result.returncode == 0, result.stderr[-6000:]
    assert "nll " in result.stdout
