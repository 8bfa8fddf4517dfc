"""Train with several methods and compare what they learnt: one recipe, one table.

python tools/compare_quality.py --config launch/recipes/smollm2-135m-gsm8k.yaml --ranks 2 \
    --runs full:2e-4 adagradselect:8e-4 random:4e-4

Each run is `METHOD:LEARNING_RATE`, optionally `:STAGE` (1, 2 or 3; default 2). Everything else comes from the recipe,
and whatever follows `--` goes to launch/train.py as it is. The held-out rows are the recipe's test split, or those of
`--heldout`. Prints a Markdown table with the answer NLL before and after, and the date, hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from agsel.policies import METHODS

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "deepspeed", "transformers", "trl")


@dataclass(frozen=True)
class Run:
    """One training run of the comparison."""

    method: str
    learning_rate: str
    stage: str = "2"

    @classmethod
    def parse(cls, text: str) -> Run:
        """From `METHOD:RATE[:STAGE]`.

        Raises:
            ArgumentTypeError: it is not of that form, or there is no such method.
        """
        method, *numbers = text.split(":")
        try:
            rate, stage = [*numbers, cls.stage][:2]
            if len(numbers) > 2 or float(rate) <= 0 or stage not in ("1", "2", "3"):
                raise ValueError
        except ValueError:
            message = f"{text!r} is not METHOD:RATE[:STAGE], for example adagradselect:8e-4 or full:2e-4:3"
            raise argparse.ArgumentTypeError(message) from None
        if method not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method {method!r} in {text!r}: use one of {', '.join(METHODS)}")
        return cls(method, rate, stage)

    @property
    def name(self) -> str:
        """Folder name."""
        return f"{self.method}-{self.learning_rate}-zero{self.stage}"


def main() -> None:
    """Train and evaluate every run, then print the table."""
    own, passed_on = _split(sys.argv[1:])
    parser = _parser()
    arguments = parser.parse_args(own)
    try:
        recipe = read_recipe(arguments)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    try:
        compare(recipe, arguments, passed_on)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"agsel: error: {_failure(error)}")


def read_recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of `--config` that have a value.

    Raises:
        ValueError: there is no such file, it is no YAML, or it lacks a setting that the comparison needs.
    """
    path = arguments.config
    if not path.is_file():
        raise ValueError(f"--config: there is no {path}, launch/recipes/ has some")
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is no YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path} has no settings: write one `name: value` a line, as launch/recipes/ do")
    recipe = {name: value for name, value in recipe.items() if value is not None}  # a run names them all
    if arguments.heldout is None and "dataset_test_split" not in recipe:
        raise ValueError(f"{path} names no held-out rows (dataset_test_split): give a file of them (--heldout)")
    for name in ("model_name_or_path", *(("dataset_name",) if arguments.heldout is None else ())):
        if name not in recipe:
            raise ValueError(f"--config {path} has no {name}: add it")
    return recipe


def compare(recipe: dict[str, Any], arguments: argparse.Namespace, passed_on: Sequence[str]) -> None:
    """Train and evaluate every run, then print the table.

    Raises:
        CalledProcessError: a command failed.
    """
    folder = arguments.output
    before = evaluate(recipe["model_name_or_path"], recipe, folder / "before.json", arguments)
    rows = []
    for run in arguments.runs:
        seconds = train(run, folder / run.name, arguments, passed_on)
        after = evaluate(folder / run.name / "model", recipe, folder / run.name / "evaluation.json", arguments)
        rows.append({"run": run, "seconds": seconds, "after": after})
    print(table(before, rows))
    print(setting(arguments.ranks))


def _failure(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}, the reason is above, of the command: {shlex.join(error.cmd)}"
    return str(error)


def train(run: Run, output: Path, arguments: argparse.Namespace, passed_on: Sequence[str]) -> float:
    """Run launch/train.py through the deepspeed command. Returns its wall-clock seconds, start-up included."""
    started = time.monotonic()
    command = ["deepspeed", "--num_gpus", str(arguments.ranks), "launch/train.py", "--config", str(arguments.config)]
    command += ["--method", run.method, "--learning_rate", run.learning_rate, "--output_dir", str(output)]
    command += ["--deepspeed", f"zero{run.stage}", *passed_on]
    subprocess.run(command, check=True, cwd=REPOSITORY, env=os.environ)
    return time.monotonic() - started


def evaluate(model: str | Path, recipe: dict[str, Any], output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run launch/evaluate.py on the recipe's held-out rows. Returns what it wrote."""
    command = [sys.executable, "launch/evaluate.py", "--model", str(model), "--output", str(output)]
    if arguments.heldout is None:
        command += ["--dataset", recipe["dataset_name"], "--dataset_split", recipe["dataset_test_split"]]
        command += ["--dataset_config", recipe["dataset_config"]] if "dataset_config" in recipe else []
    else:
        command += ["--dataset", arguments.heldout]
    for name in ("prompt_field", "completion_field", "prompt_template", "completion_template"):
        command += [f"--{name}", recipe[name]] if name in recipe else []
    command += [] if arguments.generate else ["--skip_generation"]
    output.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, check=True, cwd=REPOSITORY)
    return json.loads(output.read_text())


def table(before: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The comparison in Markdown."""
    lines = ["| method | learning rate | ZeRO | answer NLL | exact match | wall clock |", "|---|---|---|---|---|---|"]
    lines.append(f"| before | - | - | {before['nll']:.3f} | {_percent(before)} | - |")
    for row in rows:
        run, after = row["run"], row["after"]
        lines.append(
            f"| {run.method} | {run.learning_rate} | {run.stage} | {after['nll']:.3f} | {_percent(after)} "
            f"| {row['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def setting(ranks: int) -> str:
    """Date, hardware and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"\n{date.today()}, {ranks} x {device}, {versions}"


def _percent(evaluation: dict[str, Any]) -> str:
    accuracy = evaluation.get("accuracy")
    return "-" if accuracy is None else f"{accuracy:.1%}"


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before and after `--`."""
    cut = words.index("--") if "--" in words else len(words)
    return list(words[:cut]), list(words[cut + 1 :])


def _here(path: str) -> Path:
    """Of the folder the user is in: the commands run in the repository."""
    return Path(path).resolve()


def _here_if_file(name: str) -> str:
    return str(_here(name)) if Path(name).exists() else name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=_here, required=True, help="recipe of launch/recipes/")
    parser.add_argument("--runs", nargs="+", required=True, type=Run.parse, metavar="METHOD:RATE[:STAGE]")
    parser.add_argument(
        "--heldout", type=_here_if_file, help="hub name or file with rows like the recipe's, in place of its test split"
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes, one a GPU")
    parser.add_argument("--output", type=_here, default="runs/comparison", help="folder for the runs")
    parser.add_argument("--generate", action="store_true", help="also measure exact match by greedy generation (slow)")
    return parser


if __name__ == "__main__":
    main()
