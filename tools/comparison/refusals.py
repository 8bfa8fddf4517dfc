"""What is wrong with a plan, asked before anything is trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from datasets import Dataset

from agsel.data.fields import Fields
from agsel.data.formats import read_rows
from agsel.errors import UserError, complaints_of_libraries, one_line, said_of
from agsel.evaluate import tasks_of
from agsel.evaluation.harness import require_tasks, tasks_of_harness
from agsel.evaluation.options import EvaluationArguments, EvaluationParser
from agsel.evaluation.tasks import Task
from agsel.train import default_settings
from agsel.training.data import READ_BY, load_data, require_data
from agsel.training.settings import Settings, read_settings
from tools.comparison.overlaps import said_of_overlaps
from tools.comparison.plan import PARTS, Cell, Part, Plan, Run, words_of
from tools.comparison.plan_file import OF_THE_PLAN

NOT_OF_A_CELL = {
    "model_name_or_path": "all cells start from the same weights: name the model in `settings` or in the recipe",
    "data_seed": "rows come in the same order in all cells: leave it out",
    **OF_THE_PLAN,
}
"""Flags of launch/train.py that a cell must not have, and the remedy."""


OF_THE_RUNS = {
    "model": "each run's own is measured",
    "output": "results go into the folder of each run",
}
"""Flags of launch/evaluate.py that a plan must not have, and why."""
Rows = dict[str, Dataset]
"""To train on and of each part, by what they are."""


def require_sound(plan: Plan) -> list[str]:
    """Refuse a plan with which runs would fail, or whose table would be unfair.

    Returns:
        Lines for people, on what may be meant but makes the table say less.

    Raises:
        UserError: names the cell, the setting and the remedy.
    """
    _require_rates(plan)
    _require_parts(plan)
    _require_same_answers(plan)
    unknown = next((name for name in plan.compare_with if name not in plan.cells), None)
    if unknown is not None:
        raise UserError(f"compare_with names {unknown}, which is no cell: there are {', '.join(plan.cells)}")
    rows: dict[str, Rows] = {}
    with TemporaryDirectory() as folder:
        shared = Path(folder, "shared.yaml")
        write_shared(plan, shared)
        settings = {cell.name: _resolve(cell, plan, shared, rows) for cell in plan.cells.values()}
    for one, other in combinations(plan.cells.values(), 2):
        if settings[one.name] == settings[other.name] and {*one.learning_rates} & {*other.learning_rates}:
            raise UserError(f"cells {one.name} and {other.name} train the same: leave one out")
    return list(dict.fromkeys(line for of_cells in rows.values() for line in said_of_overlaps(of_cells)))


def write_shared(plan: Plan, path: Path) -> None:
    """What all cells share, for `--config`: there, settings that a method does not read are ignored."""
    path.write_text("# what all runs of this comparison share\n" + yaml.safe_dump(plan.shared, sort_keys=False))


def _require_rates(plan: Plan) -> None:
    for cell in plan.cells.values():
        if not cell.learning_rates:
            raise UserError(f"cell {cell.name} has no learning rate: add `learning_rates: [...]` to it, or to the plan")
        folders = {f"{rate:g}" for rate in cell.learning_rates}
        if not all(0 < rate < math.inf for rate in cell.learning_rates) or len(folders) < len(cell.learning_rates):
            raise UserError(f"cell {cell.name}: learning_rates must be different numbers above 0, in six digits")
    own = [cell for cell in plan.cells.values() if cell.name not in plan.of_base]
    tries = Counter(len(cell.learning_rates) for cell in own)
    if len(tries) > 1:
        listed = ", ".join(f"{cell.name} {len(cell.learning_rates)}" for cell in own)
        raise UserError(f"cells have unequally many learning_rates ({listed}): a fair choice gives each as many tries")


def _require_parts(plan: Plan) -> None:
    if plan.chooses_rates and not plan.validation:
        raise UserError(
            "the plan has no validation part, and learning rates are to be chosen: add `validation: {dataset: ..., "
            "dataset_split: ...}` with rows that are not in the test part, or give each cell one rate"
        )
    for part in ("evaluate", *PARTS):
        flags = getattr(plan, part)
        for name, why in OF_THE_RUNS.items():
            if name in flags:
                raise UserError(f"{part}: {why}: leave out {name}")
    if plan.forgetting is not None:
        _require_text(Path(plan.forgetting))


def _require_text(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"forgetting: there is no file {path}, name one with plain text")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"forgetting: cannot read {path}, {one_line(error)}: name a text file in UTF-8") from error
    if not text.strip():
        raise UserError(f"forgetting: {path} is empty: name a file with plain text")


def _require_same_answers(plan: Plan) -> None:
    """Row by row, only tokens of the same answers can be compared."""
    if not plan.compare_with:
        return
    judged = {name: plan.evaluation_of(Run(name, 1.0, plan.seeds[0]), "test") for name in plan.cells}
    for one, other in combinations(plan.cells, 2):
        for flag in ("completion_field", "completion_template"):
            if judged[one].get(flag) != judged[other].get(flag):
                raise UserError(
                    f"cells {one} and {other} have answers of another {flag}, and compare_with compares the same ones: "
                    f"give `test` a {flag} for all, or leave out compare_with"
                )


def _resolve(cell: Cell, plan: Plan, shared: Path, rows: dict[str, Rows]) -> dict[str, Any]:
    """The settings of a cell beside its learning rate, after refusing them and those of its evaluation.

    Args:
        rows: of the cells before, by what names them; other ones of this cell are added.
    """
    run = Run(cell.name, cell.learning_rates[0], plan.seeds[0])
    with said_of(f"cell {cell.name}"):
        settings = _train_settings(cell, plan, shared)
        require_data(settings.values, settings.group(Fields))
        tasks = {part: _require_evaluation(plan, run, part) for part in plan.parts}
        own = [tasks[part].source for part in plan.parts if part != "other"]
        if len({(source.name, source.split, source.config) for source in own}) < len(own):
            raise UserError("validation and test are the same rows: the test part must not choose the learning rate")
        data = {name: settings.values[name] for name in READ_BY}
        named = repr((data, settings.group(Fields), tasks))
        if named not in rows:
            rows[named] = _read(data, settings.group(Fields), tasks)
    return settings.values


def _read(data: Mapping[str, Any], fields: Fields, tasks: Mapping[Part, Task]) -> Rows:
    rows = {"the training data": load_data(data, fields).train}
    for part, task in tasks.items():
        with said_of(f"the {part} part"):
            rows[f"the {part} part"], _ = read_rows(task.source, task.fields)
    return rows


def _train_settings(cell: Cell, plan: Plan, shared: Path) -> Settings:
    for name, remedy in NOT_OF_A_CELL.items():
        if name in cell.settings:
            raise UserError(f"{name} is no setting of one cell: {remedy}")
    words = [*words_of(cell.settings), *plan.words, "--output_dir", str(plan.output)]
    return read_settings(["--config", str(shared), *words], default_settings())


def _require_evaluation(plan: Plan, run: Run, part: Part) -> Task:
    """What is judged in a part, after refusing its flags."""
    flags = {"model": plan.shared.get("model_name_or_path"), **plan.evaluation_of(run, part)}
    with said_of(f"the {part} part"), complaints_of_libraries():
        parser = EvaluationParser((EvaluationArguments, Fields), allow_abbrev=False)
        arguments, fields, unknown = parser.parse_args_into_dataclasses(
            [*words_of(flags)], return_remaining_strings=True
        )
        tasks = tasks_of(arguments, fields)
    if unknown:
        raise UserError(f"the {part} part: unknown flag {unknown[0]} of launch/evaluate.py")
    if len(tasks) != 1:
        raise UserError(f"the {part} part judges {len(tasks)} tasks, and a comparison is of one: name one")
    if arguments.lm_eval:
        with said_of(f"the {part} part"):
            require_tasks(tasks_of_harness(arguments.lm_eval))
    return tasks[0]
