"""The shortest cases with a real Slurm, all on this machine: needs root, slurm-wlm and munge, but no namespaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import Slurm, slurm_here
from tests.tiny_run import TRAIN, save_model, save_rows, settings

HERE = {"MASTER_ADDR": "127.0.0.1"}
"""Nodes that are all this machine cannot be found by their names."""

TASKS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with slurm_here(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return save_model(folder / "model"), save_rows(folder / "rows.jsonl", 32)


def test_two_tasks_of_srun_are_one_run(slurm: Slurm, parts: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = settings(*parts, tmp_path / "run", max_steps=1)
    output = slurm.run("srun", "--nodes=2", "--ntasks=2", "python", TRAIN, *arguments, env=HERE)
    assert "float32, 2 ranks" in output
    assert output.count("done      ") == 1


def test_a_job_that_is_warned_is_queued_again_and_goes_on(
    slurm: Slurm, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    """By the signal that Slurm sends before the time is up."""
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 100000")
    arguments = settings(*parts, run, output_dir=None, max_steps=None, logging_steps=1)
    job = slurm.submit(*TASKS, "launch/train.sbatch", run, "--config", recipe, *arguments, env=HERE)
    job.says(r"step +3/100000")
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    job.says("queued again, restart 1")
    [checkpoint] = run.glob("checkpoint-*")
    recipe.write_text(f"max_steps: {int(checkpoint.name.split('-')[1]) + 3}")
    output = job.ends("COMPLETED")
    assert f"{checkpoint}, every file verified" in output
    assert output.count("float32, 2 ranks") == 2
    assert output.count("done      ") == 1
    assert (run / "model" / "model.safetensors").exists()


def test_a_job_chooses_its_folder_and_checkpoint_itself(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit(*TASKS, "launch/train.sbatch", tmp_path / "run", "--output_dir", tmp_path / "other", env=HERE)
    assert "--output_dir: leave it out" in job.ends("FAILED")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made_is_refused(slurm: Slurm) -> None:
    job = slurm.submit(*TASKS, "launch/train.sbatch", "/dev/null/run", "--config", "recipe.yaml", env=HERE)
    assert "cannot make the run folder /dev/null/run: choose another" in job.ends("FAILED")
