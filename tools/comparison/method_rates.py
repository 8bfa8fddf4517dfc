"""A comparison that is typed: one recipe, and `METHOD:RATE[:STAGE]` of each run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from agsel.data.fields import TEMPLATES, Fields, unescape
from agsel.errors import UserError
from agsel.policies import METHODS
from tools.comparison.plan import Cell, Plan
from tools.comparison.plan_file import read_recipe

OF_THE_ROWS = ("model_name_or_path", "dataset_name", "dataset_config", "dataset_test_split")
"""Flags of launch/train.py, beside those of columns, that evaluations follow."""
OF_EACH_RUN = {
    "learning_rate": "write it in --runs, METHOD:RATE",
    "seed": "write it into the recipe",
    "output_dir": "name the folder of all runs, --output",
    "resume_from_checkpoint": "runs go on by themselves",
}
"""Flags of launch/train.py that each run is given, and the remedy."""


def parse_cell(text: str) -> Cell:
    """A cell with one learning rate from `METHOD:RATE[:STAGE]`.

    Raises:
        ArgumentTypeError: it is not of that form, or there is no such method.
    """
    method, *numbers = text.split(":")
    try:
        rate, stage = [*numbers, "2"][:2]
        if len(numbers) > 2 or float(rate) <= 0 or stage not in ("1", "2", "3"):
            raise ValueError
    except ValueError:
        message = f"{text!r} is not METHOD:RATE[:STAGE], for example adagradselect:8e-4 or full:2e-4:3"
        raise argparse.ArgumentTypeError(message) from None
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"unknown method {method!r} in {text!r}: use one of {', '.join(METHODS)}")
    settings = {"method": method, "deepspeed": f"zero{stage}"}
    return Cell(f"{method}-{rate}-zero{stage}", settings, (float(rate),))


def plan_of_rates(options: argparse.Namespace, words: Sequence[str]) -> Plan:
    """The plan of a command line with `--config` and `--runs`: one seed, no choice of a learning rate.

    Args:
        options: of the command line.
        words: of the command line of launch/train.py, for all runs.

    Raises:
        UserError: a run stands twice, the recipe lacks something, or there are no ranks.
    """
    if options.ranks < 1:
        raise UserError(f"ranks must be at least 1, got {options.ranks} (--ranks)")
    recipe = read_recipe(options.config) | _of_evaluations(words)
    if "model_name_or_path" not in recipe:
        raise UserError(f"--config {options.config} has no model_name_or_path: add it")
    cells = {cell.name: cell for cell in options.runs}
    if len(cells) < len(options.runs):
        raise UserError("a run stands twice (--runs): leave one out")
    return Plan(
        output=options.output,
        shared=recipe,
        cells=cells,
        seeds=(recipe.get("seed", TrainingArguments.seed),),
        test={"dataset": options.heldout} if options.heldout else _test_split(recipe, options.config),
        evaluate={} if options.generate else {"skip_generation": True},
        gpus_per_run=options.ranks,
        words=tuple(words),
    )


def _of_evaluations(words: Sequence[str]) -> dict[str, Any]:
    """What words of launch/train.py say of the model, the held-out rows and their columns, which evaluations follow.

    Raises:
        UserError: they give what each run is given.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*OF_EACH_RUN, *OF_THE_ROWS, *(column.name for column in fields(Fields))):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, default=argparse.SUPPRESS)
    try:
        said = vars(parser.parse_known_args(words)[0])
    except argparse.ArgumentError as error:
        raise UserError(f"behind --: {error}") from None
    if mine := said.keys() & OF_EACH_RUN.keys():
        name = min(mine)
        raise UserError(f"--{name} behind -- would change nothing: {OF_EACH_RUN[name]}")
    return {name: unescape(value) if name in TEMPLATES else value for name, value in said.items()}


def _test_split(recipe: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The recipe's held-out rows."""
    if "dataset_test_split" not in recipe:
        raise UserError(f"{path} names no held-out rows (dataset_test_split): give a file of them (--heldout)")
    if "dataset_name" not in recipe:
        raise UserError(f"--config {path} has no dataset_name: add it")
    configuration = {"dataset_config": recipe["dataset_config"]} if "dataset_config" in recipe else {}
    return {"dataset": recipe["dataset_name"], "dataset_split": recipe["dataset_test_split"], **configuration}
