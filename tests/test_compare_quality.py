"""tools/compare_quality.py: mistakes in one line, intervals, slots; real comparisons, also after a kill."""

from __future__ import annotations

import csv
import json
import math
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from agsel import evaluate
from agsel.data.fields import unescape, with_line_breaks
from agsel.errors import RunError, UserError
from agsel.evaluation.findings import as_lines
from tests.distributed import REPOSITORY, environment
from tests.tiny_run import TRAIN, save_model, save_rows
from tools.comparison import comparing, differences, records
from tools.comparison.children import Children, reason
from tools.comparison.chosen_rates import chosen_rates, may_be_chosen
from tools.comparison.comparison_table import Row, collect, markdown
from tools.comparison.differences import Judged
from tools.comparison.method_rates import parse_cell, plan_of_rates
from tools.comparison.origin import contents_of
from tools.comparison.overlaps import said_of_overlaps
from tools.comparison.pareto import points_of
from tools.comparison.places import Gpu, Place, places, said_of_others, visible
from tools.comparison.plan import BEFORE, Plan, Run, words_of
from tools.comparison.plan_file import read_plan
from tools.comparison.records import Records, new_record
from tools.comparison.refusals import require_sound
from tools.comparison.runs import Runner, Task, evaluate_words, file_bytes, share_of, train_words
from tools.comparison.schedule import CONTEXT_BYTES, Outcome, Perform, Schedule

RECIPE: dict[str, Any] = {
    "prompt_field": "question",
    "completion_field": "answer",
    "prompt_template": None,
    "completion_template": " {answer}",
    "select_fraction": 0.5,
    "per_device_train_batch_size": 2,
    "max_steps": 30,
    "max_length": 64,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}
PLANS = sorted(path for folder in ("comparison", "quality") for path in (REPOSITORY / "tools" / folder).glob("*.yaml"))


def start(*arguments: object, folder: Path = REPOSITORY) -> subprocess.Popen[str]:
    command = [sys.executable, REPOSITORY / "tools/compare_quality.py", *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment(), **pipes)


def compare(*arguments: object, folder: Path = REPOSITORY) -> tuple[int, str, str]:
    """Exit code, output and errors of the command."""
    process = start(*arguments, folder=folder)
    output, errors = process.communicate(timeout=500)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, rows.jsonl and recipe.yaml."""
    folder = tmp_path_factory.mktemp("parts")
    save_model(folder / "model")
    save_rows(folder / "rows.jsonl", 48)
    model, rows = str(folder / "model"), str(folder / "rows.jsonl")
    recipe = RECIPE | {"model_name_or_path": model, "dataset_name": rows, "dataset_train_split": "train[:32]"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def plan_of(parts: Path, **changed: Any) -> dict[str, Any]:
    rows = str(parts / "rows.jsonl")
    return {
        "config": str(parts / "recipe.yaml"),
        "output": str(parts / "never"),
        "evaluate": {"skip_generation": True},
        "test": {"dataset": rows, "dataset_split": "train[40:]"},
        "seeds": [0],
        "runs_per_gpu": 2,
        "cells": {
            "full": {"method": "full", "learning_rates": [1e-2]},
            "topk": {"method": "topk", "learning_rates": [1e-2]},
        },
    } | changed


def written(path: Path, plan: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line of the command when it refuses these arguments, in this process: imports take seconds."""

    def of(*arguments: object) -> str:
        with pytest.raises(SystemExit) as end:
            comparing.main([*map(str, arguments)])
        if end.value.code == 2:  # of argparse
            return capsys.readouterr().err.strip().splitlines()[-1]
        line = str(end.value.code)
        assert line.startswith("agsel: error: ")
        assert "\n" not in line
        return line

    return of


def cell(**settings: Any) -> dict[str, Any]:
    return {"method": "full", "learning_rates": [1e-2]} | settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sedes": [1]}, "unknown name 'sedes' in the plan"),
        ({"seeds": None}, "has no seeds"),
        ({"seeds": [1, 1]}, "seeds in the plan is [1, 1]: write different whole numbers"),
        ({"cells": {"a/b": cell()}}, "'a/b' names no cell"),
        ({"cells": {"before": cell()}}, "'before' names no cell"),
        ({"cells": {"a": cell(lora_rank=8)}}, "cell a: unknown setting 'lora_rank' on the command line; did you mean"),
        ({"cells": {"a": cell(select_fraction=0.3)}}, "cell a: full does not read --select_fraction: leave it out"),
        ({"cells": {"a": cell(seed=3)}}, "cell a: seed is no setting of one cell: all cells have the same"),
        ({"cells": {"a": cell(model_name_or_path="b")}}, "all cells start from the same weights"),
        ({"cells": {"a": cell(lora_r=None)}}, "cell a: lora_r has no value"),
        ({"cells": {"a": cell(), "b": cell()}}, "cells a and b train the same: leave one out"),
        ({"cells": {"a": {"method": "full"}}}, "cell a has no learning rate"),
        ({"cells": {"a": cell(learning_rates=["fast"])}}, "cell a: learning_rates is ['fast']"),
        ({"cells": {"a": cell(learning_rates=[1, 2])}}, "the plan has no validation part"),
        (
            {"cells": {"a": cell(learning_rates=[1, 2]), "b": cell(use_peft=True)}, "validation": {"limit": 1}},
            "cells have unequally many learning_rates (a 2, b 1)",
        ),
        ({"settings": {"max_step": 3}}, "unknown setting 'max_step' in the file of --config; did you mean 'max_steps'"),
        ({"test": {"dataset_split": "train"}}, "the test part: nothing to judge: name rows (--dataset)"),
        (
            {"test": {"dataset": "rows.jsonl", "limits": 3}},
            "the test part: unknown flag --limits of launch/evaluate.py",
        ),
        ({"test": {"dataset": "rows.jsonl", "limit": "all"}}, "invalid int value: 'all'"),
        ({"validation": {"dataset": "rows.jsonl"}, "test": {"dataset": "rows.jsonl"}}, "are the same rows"),
        ({"forgetting": 5}, "forgetting in the plan is 5: write the name of a file"),
        ({"seeds": [-1]}, "seeds in the plan is [-1]: write different whole numbers from 0"),
        ({"cells": {"runs.jsonl": cell()}}, "'runs.jsonl' names no cell"),
        ({"cells": {"a": cell(learning_rates=[math.nan])}}, "cell a: learning_rates must be different numbers above 0"),
        ({"cells": {"a": cell(learning_rates=[math.inf])}}, "cell a: learning_rates must be different numbers above 0"),
        ({"cells": {"a": cell(learning_rates=[1, 1 + 1e-9])}}, "cell a: learning_rates must be different numbers"),
        ({"cells": {"a": cell(learning_rates="12")}}, "cell a: learning_rates is '12': write a list of numbers"),
        ({"cells": {"a": cell(learning_rates=[True])}}, "cell a: learning_rates is [True]: write a list of numbers"),
        ({"settings": {"learning_rate": 1}}, "settings: learning_rate is not for all runs: write `learning_rates"),
        ({"evaluate": {"model": "b"}}, "evaluate: each run's own is measured: leave out model"),
        ({"test": {"dataset": "rows.jsonl", "output": "a.json"}}, "test: results go into the folder of each run"),
        ({"test": {"dataset": "nowhere.jsonl"}}, "the test part: no such file: nowhere.jsonl"),
        ({"evaluate": {"lm_eval": "nowhere.yaml"}}, "the test part: cannot load nowhere.yaml (--lm_eval)"),
        (
            {"cells": {"a": cell(), "b": cell(completion_template="{answer}.")}, "compare_with": ["a"]},
            "cells a and b have answers of another completion_template",
        ),
        ({"forgetting": "nowhere.txt"}, "forgetting: there is no file nowhere.txt"),
        ({"compare_with": ["lora"]}, "compare_with names lora, which is no cell: there are full, topk"),
        ({"runs_per_gpu": 0}, "runs_per_gpu in the plan is 0: it must be a whole number from 1 on"),
        ({"config": "nowhere.yaml"}, "config: there is no nowhere.yaml, launch/recipes/ has some"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line_before_anything_is_written(
    refusal: Callable[..., str], parts: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    plan = written(tmp_path / "plan.yaml", plan_of(parts, output=str(tmp_path / "out"), **changed))
    assert message in refusal(plan)
    assert not (tmp_path / "out").exists()


def test_a_misspelt_name_of_a_plan_without_cells_is_named(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert "did you mean 'cells'?" in refusal(written(tmp_path / "plan.yaml", {"cell": {"a": cell()}}))


def test_a_recipe_is_no_plan(refusal: Callable[..., str]) -> None:
    recipe = REPOSITORY / "launch" / "recipes" / "smollm2-135m-gsm8k.yaml"
    assert f"{recipe} has no cells: it is no plan; a recipe goes with --config, and --runs" in refusal(recipe)


@pytest.mark.parametrize("name", ["dataset", "dataset_name"])
def test_the_same_rows_are_refused_however_they_are_named(
    refusal: Callable[..., str], parts: Path, tmp_path: Path, name: str
) -> None:
    validation = {name: str(parts / "rows.jsonl"), "dataset_split": "train[40:]", "limit": 4}
    plan = written(tmp_path / "plan.yaml", plan_of(parts, validation=validation))
    assert "validation and test are the same rows" in refusal(plan)


@pytest.mark.parametrize(("content", "message"), [(b"\xff", "cannot read"), (b" \n", "is empty")])
def test_a_text_that_cannot_be_read_is_refused(
    refusal: Callable[..., str], parts: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    plan = written(tmp_path / "plan.yaml", plan_of(parts, forgetting=str(tmp_path / "text.txt")))
    assert re.search(rf"forgetting: .*{message}", refusal(plan))


def test_templates_arrive_as_the_plan_has_them() -> None:
    r"""The commands take `\n` for a line break; a plan says that by one."""
    settings = {"completion_template": "\\nu {answer}\n", "answer_pattern": r"\d+"}
    assert with_line_breaks([*words_of(settings)])[1::2] == [*settings.values()]


def test_results_of_rows_with_any_characters_are_read(tmp_path: Path) -> None:
    rows = [{"row": row, "prompt": "a\u2028b\x85c", "completion_tokens": 1, "nll": 1.0} for row in range(2)]
    (tmp_path / "test.jsonl").write_text(as_lines(rows), encoding="utf-8")
    assert Judged.read(tmp_path / "test.jsonl").rows == [0, 1]


def test_a_cell_that_stands_twice_is_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("cells:\n  full: {method: full}\n  topk: {method: topk}\n  full: {lora_r: 1}\n")
    assert "full stands in line 2 and again in line 4: leave one out" in refusal(tmp_path / "plan.yaml")


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_the_plans_of_the_repository_are_sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: Path) -> None:
    """With files of the columns of GSM8K in the places where they are expected, and one with those of MetaMathQA."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"question": f"{number} + 1?", "answer": f"#### {number + 1}"}) for number in range(16292)]
    files = {"gsm8k/train": (0, 7473), "arithmetic/train": (7473, 13473)}
    files |= {"arithmetic/validation": (13473, 13973), "arithmetic/test": (13973, 14973), "gsm8k/test": (14973, 16292)}
    for name, (first, last) in files.items():
        file = Path("data", f"{name}.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(rows[first:last]))
    Path("data/metamathqa").mkdir()
    Path("data/metamathqa/train.jsonl").write_text('{"query": "1 + 1?", "response": "The answer is: 2"}')
    for name in ("plain_text", "metamathqa/text"):
        Path(f"data/{name}.txt").write_text("text")
    for name in ("launch", "tools"):
        Path(name).symlink_to(REPOSITORY / name)
    assert require_sound(read_plan(path)) == [], "no row is in two parts"


def test_rows_that_are_in_two_parts_are_said() -> None:
    def rows(*texts: str) -> Dataset:
        return Dataset.from_list(
            [{"prompt": text, "completion": "2", "messages": None, "tools": None} for text in texts]
        )

    named = {"training": rows("a", "b", "c"), "validation": rows("d", "a"), "test": rows("e", "d", "d", "f")}
    assert list(said_of_overlaps(named)) == [
        "note      1 of the 2 rows of validation are among those of training",
        "note      2 of the 4 rows of test are among those of validation",
    ]


def test_rows_of_every_cell_are_compared(parts: Path, tmp_path: Path) -> None:
    cells = plan_of(parts)["cells"]
    plan = plan_of(parts, cells=cells | {"topk": cells["topk"] | {"dataset_train_split": "train[:42]"}})
    assert require_sound(read_plan(written(tmp_path / "plan.yaml", plan))) == [
        "note      2 of the 8 rows of the test part are among those of the training data"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to compare: name a PLAN.yaml, or --config and --runs"),
        (("plan.yaml", "--runs", "full:1e-4"), "a plan says all there is to run: leave out --config, --runs"),
        (("plan.yaml", "--output", "elsewhere"), "a plan says all there is to run: leave out --config, --runs"),
        (("--runs", "full"), "'full' is not METHOD:RATE[:STAGE], for example"),
        (("--runs", "full:fast"), "'full:fast' is not METHOD:RATE[:STAGE]"),
        (("--runs", "full:1e-4:4"), "'full:1e-4:4' is not METHOD:RATE[:STAGE]"),
        (("--runs", "full:1e-4:2:2"), "'full:1e-4:2:2' is not METHOD:RATE[:STAGE]"),
        (("--runs", "fool:1e-4"), "unknown method 'fool' in 'fool:1e-4': use one of adagradselect, topk"),
        (("--runs", "full:1e-4", "full:1e-4"), "a run stands twice (--runs): leave one out"),
        (("plan.yaml", "--minutes", "0"), "argument --minutes: 0 is no time: write a number above 0"),
        (("plan.yaml", "--minutes", "few"), "argument --minutes: few is no time: write a number above 0"),
        (("--runs", "full:1e-4", "--ranks", "0"), "ranks must be at least 1, got 0 (--ranks)"),
        (("--runs", "full:1e-4", "--config", "nowhere.yaml"), "nowhere.yaml, launch/recipes/ has some"),
        (("--runs", "full:1e-4"), "names no held-out rows (dataset_test_split): give a file of them (--heldout)"),
        (
            ("--runs", "full:1e-4", "--", "--seed", "7"),
            "--seed behind -- would change nothing: write it into the recipe",
        ),
        (("--runs", "full:1e-4", "--", "--learning-rate=1"), "--learning_rate behind -- would change nothing"),
        (("--runs", "full:1e-4", "--", "--prompt_field"), "behind --: argument --prompt_field"),
    ],
)
def test_mistakes_are_named_in_one_line(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(REPOSITORY)
    recipe = ("--config", "launch/recipes/demo.yaml") if "--runs" in arguments and "plan.yaml" not in arguments else ()
    assert message in refusal(*recipe, *arguments)


def test_evaluations_follow_what_is_said_behind_the_options(parts: Path) -> None:
    """Of the model, the rows and their columns; templates as typed."""
    words = ["--model_name_or_path", "other", "--prompt-field=answer", "--completion_template", r" {question}\n"]
    runs = [parse_cell("full:1e-2")]
    options = Namespace(config=parts / "recipe.yaml", runs=runs, ranks=1, output=parts, heldout=None, generate=False)
    said = ["--dataset_test_split", "train[5:9]", "--max_steps", "3"]
    plan = plan_of_rates(options, [*words, *said])
    (run,) = plan.tuning_runs()
    assert train_words(plan, run)[-len([*words, *said]) - 8 : -8] == [*words, *said]
    asked = dict(pairwise(evaluate_words(plan, run, "test")))
    assert (asked["--prompt_field"], asked["--dataset_split"]) == ("answer", "train[5:9]")
    assert unescape(asked["--completion_template"]) == " {question}\n"
    assert dict(pairwise(evaluate_words(plan, Run(BEFORE), "test")))["--model"] == "other"


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_tables_of_a_result_that_is_no_number(parts: Path, tmp_path: Path, number: float) -> None:
    plan = read_plan(written(tmp_path / "plan.yaml", plan_of(parts, output=str(tmp_path / "out"), seeds=[0, 1])))
    records = Records(tmp_path / "runs.jsonl")
    result = {"train_seconds": 1.0, "steps": 1, "timed_steps": 1, "step_seconds": 1.0, "trainable_parameters": 5}
    for seed, nll in enumerate((0.5, number)):
        for cell in plan.cells:
            told = {"test": {"nll": nll}, "judged": judged([nll, nll], [3, 4]), "result": result, "file_bytes": 1}
            run = Run(cell, 1e-2, seed)
            records.put(run, record_of(plan, run, error=None, **told))
    rows = collect(plan, records, dict.fromkeys(plan.cells, 1e-2))
    assert f"{number} ± nan" in markdown(plan, records, rows)
    assert points_of(rows, "NLL", "train time, s") == []


def test_forgetting_and_cost_are_counted_over_the_seeds() -> None:
    """GaLLoP's forget ratio, by which share exact matches have become fewer, and collapse rate, those below 1 %."""
    before = {"other": {"accuracy": 0.2}, "test": {"text_nll": 3.0}}
    shares, nll = (0.15, 0.0099, 0.01, 0.3), (3.5, 3.25, 3.0, 2.75)
    results = [{"train_seconds": 6.0, "steps": 8, "timed_steps": timed} for timed in (8, 4, 4, 2)]
    records = [
        {"other": {"accuracy": share}, "test": {"text_nll": loss}, "result": result}
        for share, loss, result in zip(shares, nll, results, strict=True)
    ]
    row = Row("a", 1e-3, records, before=before, seeds=4)
    assert row.forget_ratios == pytest.approx([0.25, 0.9505, 0.95, 0])
    assert row.collapse_rate == 0.25
    assert row.forgetting == [0.5, 0.25, 0.0, -0.25]
    assert row.train_seconds == (6 + 12 + 12 + 24) / 4
    assert (Row("a", None).forget_ratios, Row("a", None).collapse_rate) == ([], None)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("dataset_name: rows.jsonl\ndataset_test_split: test", "recipe.yaml has no model_name_or_path: add it"),
        ("model_name_or_path: model\ndataset_test_split: test", "recipe.yaml has no dataset_name: add it"),
        ("model_name_or_path:\ndataset_name: rows\ndataset_test_split: test", "has no model_name_or_path: add it"),
        ("", "recipe.yaml has no settings"),
        ("a: b: c", "recipe.yaml is no YAML"),
    ],
)
def test_recipes_without_a_needed_setting_are_refused(
    refusal: Callable[..., str], tmp_path: Path, recipe: str, message: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert message in refusal("--config", tmp_path / "recipe.yaml", "--runs", "full:1e-4")


def judged(nll: Any, tokens: Any, correct: Any = None) -> Judged:
    return Judged(list(range(len(nll))), np.asarray(tokens, float), np.asarray(nll, float), correct)


def test_the_interval_of_accuracies_is_the_analytic_one() -> None:
    """A mean of many independent differences: mean ± 1.96 standard errors; of the pairs, not of the two cells."""
    draw = np.random.default_rng(1)
    easy = draw.random(4000) < 0.5  # right for both: pairing takes this out
    one, other = ((easy | (draw.random(4000) < chance)).astype(float) for chance in (0.10, 0.05))
    found = differences.accuracy_difference(*(judged(one, np.ones(4000), right) for right in (one, other)))
    difference = one - other
    margin = 1.96 * difference.std() / math.sqrt(4000)
    assert found is not None
    assert found.difference == pytest.approx(difference.mean())
    assert (found.low, found.high) == pytest.approx(
        (difference.mean() - margin, difference.mean() + margin), abs=0.05 * margin
    )


def test_the_interval_of_likelihoods_weighs_rows_by_their_tokens() -> None:
    """A ratio of two sums over rows: its standard error by the delta method."""
    draw = np.random.default_rng(2)
    tokens = draw.integers(5, 200, 3000).astype(float)
    shared = draw.normal(1, 0.5, 3000)
    one, other = shared + draw.normal(0.01, 0.1, 3000), shared + draw.normal(0, 0.1, 3000)
    found = differences.nll_difference(judged(one, tokens), judged(other, tokens))
    expected = np.sum(tokens * (one - other)) / tokens.sum()
    residuals = tokens * (one - other - expected)
    margin = 1.96 * residuals.std() / tokens.mean() / math.sqrt(3000)
    assert found.difference == pytest.approx(expected)
    assert (found.low, found.high) == pytest.approx((expected - margin, expected + margin), abs=0.05 * margin)


def test_losses_are_drawn_with_the_tokens_of_their_rows() -> None:
    """A difference that is the same for each token has no spread, however long the rows are."""
    tokens = np.random.default_rng(3).integers(1, 100, 50)
    found = differences.nll_difference(judged(np.full(50, 1.25), tokens), judged(np.ones(50), tokens))
    assert (found.difference, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25), rel=1e-12)


def test_a_row_of_which_no_token_counts_changes_nothing() -> None:
    """It has no mean loss."""
    with_empty = [judged([1, math.nan, 2, 4], [3, 0, 4, 5]), judged([1.5, math.nan, 2.5, 3], [3, 0, 4, 5])]
    without = [judged([1, 2, 4], [3, 4, 5]), judged([1.5, 2.5, 3], [3, 4, 5])]
    assert differences.nll_difference(*with_empty) == differences.nll_difference(*without)


def test_seeds_are_averaged_row_by_row_and_other_rows_are_refused() -> None:
    mean = differences.mean_over_seeds([judged([1, 2], [3, 4], np.ones(2)), judged([3, 2], [3, 4], np.zeros(2))])
    assert mean.nll.tolist() == [2, 2]
    assert mean.correct is not None
    assert mean.correct.tolist() == [0.5, 0.5]
    with pytest.raises(RunError, match="different rows"):
        differences.nll_difference(judged([1, 2], [3, 4]), judged([1, 2, 3], [3, 4, 5]))
    with pytest.raises(RunError, match="different rows"):
        differences.nll_difference(judged([1, 2], [3, 4]), judged([1, 2], [3, 5]))


NVIDIA_SMI = "0, GPU-a, 100000, 4\n1, GPU-b, 100000, 20000\n2, GPU-c, 100000, 0\n"


def test_gpus_that_are_hidden_are_not_used_and_those_of_others_are_said() -> None:
    assert [gpu.index for gpu in visible(NVIDIA_SMI, None)] == ["0", "1", "2"]
    assert [gpu.index for gpu in visible(NVIDIA_SMI, "GPU-c,1")] == ["2", "1"]
    said = said_of_others(visible(NVIDIA_SMI, None))
    assert len(said) == 1
    assert said[0].startswith("note      GPU 1: other processes use 21.0 of its 104.9 GB; runs share the rest")
    pair, *rest = places(visible(NVIDIA_SMI, None), 2)
    assert rest == []
    assert (pair.gpus, pair.capacity) == (("0", "1"), 80000 * 2**20)
    assert pair.environment()["CUDA_VISIBLE_DEVICES"] == "0,1"
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES names 'MIG-a', and nvidia-smi knows 0, GPU-a, 1"):
        visible(NVIDIA_SMI, "0,MIG-a")
    with pytest.raises(UserError, match="nothing of the memory of GPU 0"):
        visible("0, GPU-a, [N/A], [N/A]", None)
    with pytest.raises(UserError, match="gpus_per_run is 4, and there are 3 GPUs"):
        places(visible(NVIDIA_SMI, None), 4)


def measured(cell: str, gigabytes: float, error: str | None = None) -> dict[str, Any]:
    return {"cell": cell, "error": error, "result": {"peak_reserved_bytes": gigabytes * 1e9 - CONTEXT_BYTES}}


class Worker:
    """Does tasks for a schedule, and remembers how many it did at once, and who was with whom."""

    def __init__(self, gigabytes: dict[str, float], capacity: float = math.inf) -> None:
        self.most, self.gigabytes, self._capacity = 0, gigabytes, capacity
        self._guard, self._now = Lock(), list[str]()

    def __call__(self, task: Task, place: Place, slot: int) -> dict[str, Any]:
        with self._guard:
            self._now.append(task.run.cell)
            self.most = max(self.most, len(self._now))
            needed = sum(self.gigabytes[cell] for cell in self._now)
        time.sleep(0.05)
        with self._guard:
            self._now.remove(task.run.cell)
        error = "CUDA out of memory" if needed > self._capacity else None
        return measured(task.run.cell, self.gigabytes[task.run.cell], error)


def never() -> None:
    raise AssertionError("there was time enough")


def tasks(cell: str, number: int) -> list[Task]:
    return [Task(Run(cell, 1e-4, seed), "test") for seed in range(number)]


def done(schedule: Schedule, of: Sequence[Task], work: Perform, stop: Callable[[], None] = never) -> list[Outcome]:
    schedule.add(of)
    return list(schedule.perform(work, stop))


@pytest.mark.parametrize(("gigabytes", "at_once"), [(20, 4), (30, 3), (45, 2), (80, 1)])
def test_as_many_runs_share_a_gpu_as_were_measured_to_fit(gigabytes: float, at_once: int) -> None:
    schedule = Schedule([Place(("0",), 100e9)], 4)
    schedule.note(measured("a", gigabytes))
    worker = Worker({"a": gigabytes}, 100)
    assert len(done(schedule, tasks("a", 8), worker)) == 8
    assert worker.most == at_once


def test_all_places_are_used_and_cpus_have_as_many_slots_as_the_plan_says() -> None:
    worker = Worker({"a": 20})
    done(Schedule(places([Gpu(str(i), 100 * 10**9, 0) for i in range(2)], 1), 3), tasks("a", 12), worker)
    assert worker.most == 6
    worker = Worker({"a": 20})
    outcomes = done(Schedule(places([], 1), 2), tasks("a", 5), worker)
    assert worker.most == 2
    assert outcomes[0].at_once == 2


def test_runs_that_find_no_memory_beside_others_are_tried_alone_and_those_alone_are_not() -> None:
    worker = Worker({"large": 60}, 100)
    outcomes = done(Schedule([Place(("0",), 100e9)], 2), tasks("large", 3), worker)
    assert [outcome.record["error"] for outcome in outcomes] == [None] * 3
    worker = Worker({"larger": 120}, 100)
    outcomes = done(Schedule([Place(("0",), 100e9)], 2), tasks("larger", 2), worker)
    assert [outcome.record["error"] for outcome in outcomes] == ["CUDA out of memory"] * 2


def test_an_evaluation_keeps_to_its_share_of_a_gpu(parts: Path, tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path / "plan.yaml", plan_of(parts, runs_per_gpu=4)))
    words = [*evaluate_words(plan, RUN, "test"), *share_of(plan, Place(("0",), 100e9))]
    assert evaluate.read_arguments(words)[0].memory_fraction == 0.25
    assert share_of(plan, Place((), math.inf)) == []
    assert share_of(replace(plan, runs_per_gpu=1), Place(("0",), 100e9)) == []


def test_a_reason_is_the_last_line_that_says_one() -> None:
    trace = [
        "Traceback (most recent call last):",
        '  File "a.py"',
        "torch.OutOfMemoryError: CUDA out of memory.",
        "bye",
    ]
    assert reason(trace, 1) == "torch.OutOfMemoryError: CUDA out of memory."
    of_a_rank = [*(f"[rank0]: {line}" for line in trace[:3]), "[rank0]:[W1129 07:28:51.4 Warning: not destroyed"]
    assert reason(of_a_rank, 1) == "[rank0]: torch.OutOfMemoryError: CUDA out of memory."
    assert reason(["agsel: error: no such model"], 1) == "no such model"
    assert reason(["step 3/4"], -9) == "killed by signal 9"
    assert reason([], 3) == "exit code 3"


def test_the_file_of_a_run_is_what_it_has_trained(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name, size in {"config.json": 1, "model-1.safetensors": 20, "model-2.safetensors": 300}.items():
        (tmp_path / "model" / name).write_bytes(bytes(size))
    assert file_bytes(tmp_path) == 320
    (tmp_path / "elements.safetensors").write_bytes(bytes(4000))
    assert file_bytes(tmp_path) == 4000


def test_stopped_children_end_and_no_others_start(tmp_path: Path) -> None:
    children = Children()
    children.stop()
    with pytest.raises(RunError, match="stopped"):
        children.run([sys.executable, "-c", "print(1)"], tmp_path / "log", environment())


RUN = Run("full", 1e-2, 0)


def record_of(plan: Plan, run: Run = RUN, **changed: Any) -> dict[str, Any]:
    return new_record(plan, run, {"training data": "one"}) | changed


def test_records_of_another_plan_or_other_data_are_refused(parts: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    plan = read_plan(written(tmp_path / "plan.yaml", plan_of(parts, output=out)))
    records = Records(tmp_path / "runs.jsonl")
    records.put(RUN, record_of(plan))
    Records(tmp_path / "runs.jsonl").require_of(plan, {"training data": "one"})
    Records(tmp_path / "runs.jsonl").require_of(plan, {})
    longer = read_plan(written(tmp_path / "plan.yaml", plan_of(parts, output=out, settings={"max_steps": 40})))
    with pytest.raises(UserError, match=r"full 0\.01 seed 0 with another max_steps: choose another file"):
        Records(tmp_path / "runs.jsonl").require_of(longer, {})
    with pytest.raises(UserError, match="with another content of training data: choose another file"):
        Records(tmp_path / "runs.jsonl").require_of(plan, {"training data": "two"})
    records.put(RUN, record_of(plan, error="no memory"))
    Records(tmp_path / "runs.jsonl").require_of(longer, {})
    without_settings = json.dumps({"cell": "full", "learning_rate": 0.01, "seed": 0, "error": None})
    for damaged in ('{"cell": ', without_settings):
        (tmp_path / "runs.jsonl").write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            Records(tmp_path / "runs.jsonl")


def test_the_model_before_training_depends_on_no_setting_of_training(parts: Path, tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path / "plan.yaml", plan_of(parts)))
    records = Records(tmp_path / "runs.jsonl")
    records.put(Run(BEFORE), new_record(plan, Run(BEFORE), {}))
    records.require_of(replace(plan, shared={**plan.shared, "warmup_steps": 0.5, "seed": 3}), {})
    with pytest.raises(UserError, match="has before with another model_name_or_path"):
        records.require_of(replace(plan, shared={**plan.shared, "model_name_or_path": "other"}), {})
    with pytest.raises(UserError, match="has before with another test"):
        records.require_of(replace(plan, evaluate={**plan.evaluate, "max_new_tokens": 7}), {})


def test_a_folder_of_another_plan_is_not_gone_on_with(parts: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    plan = read_plan(written(tmp_path / "plan.yaml", plan_of(parts, output=out)))
    folder = RUN.folder(plan.output)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(new_record(plan, RUN, contents_of(plan))))
    (folder / "result.json").touch()
    Runner(plan, Records(tmp_path / "runs.jsonl"), Children(), 1)
    longer = read_plan(written(tmp_path / "plan.yaml", plan_of(parts, output=out, settings={"max_steps": 40})))
    with pytest.raises(UserError, match=r"seed-0 has full 0\.01 seed 0 with another max_steps: choose another output"):
        Runner(longer, Records(tmp_path / "runs.jsonl"), Children(), 1)
    (folder / "result.json").unlink()
    Runner(longer, Records(tmp_path / "runs.jsonl"), Children(), 1)


def test_comparisons_that_share_a_file_keep_each_others_runs(parts: Path, tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path / "plan.yaml", plan_of(parts)))
    other = Run("topk", 1e-2, 0)
    first, second = Records(tmp_path / "runs.jsonl"), Records(tmp_path / "runs.jsonl")
    first.put(RUN, record_of(plan))
    second.put(other, record_of(plan, other))
    assert {*Records(tmp_path / "runs.jsonl")} == {RUN, other}


def test_comparisons_that_write_at_once_lose_nothing(parts: Path, tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path / "plan.yaml", plan_of(parts)))
    runs = [Run("topk", 1e-2, seed) for seed in range(40)]

    def put(own: list[Run]) -> None:
        records = Records(tmp_path / "runs.jsonl")
        for run in own:
            records.put(run, record_of(plan, run))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, [runs[i::4] for i in range(4)]))
    assert {*Records(tmp_path / "runs.jsonl")} == {*runs}


def test_files_of_several_machines_are_joined_and_a_failure_takes_nothing_away(parts: Path, tmp_path: Path) -> None:
    plan = read_plan(written(tmp_path / "plan.yaml", plan_of(parts)))
    other = Run("topk", 1e-2, 0)
    judgement = judged([0.12344, 2], [3, 5], np.array([0.0, 1.0]))
    Records(tmp_path / "one").put(RUN, record_of(plan, validation={"nll": 1.0}))
    second = Records(tmp_path / "two")
    second.put(other, record_of(plan, other, error="no memory"))
    second.put(RUN, record_of(plan, test={"nll": 2.0}, judged=judgement))
    Records(tmp_path / "three").put(RUN, record_of(plan, error="no memory"))
    texts = [(tmp_path / name).read_text() for name in ("one", "two", "three")]
    (tmp_path / "all").write_text("".join(texts))
    joined = Records(tmp_path / "all")
    assert {*joined} == {RUN, other}
    assert joined.has(RUN, "validation")
    assert joined.has(RUN, "test")
    assert joined[other]["error"] == "no memory"
    found = joined.judged(RUN)
    assert found.rows == judgement.rows
    assert found.tokens.tolist() == [3, 5]
    assert found.nll.tolist() == [0.1234, 2]
    assert found.correct is not None
    assert found.correct.tolist() == [0, 1]


def test_what_has_the_most_tries_first_is_trained_first(parts: Path, tmp_path: Path) -> None:
    cells = {"a": cell(learning_rates=[1, 2]), "b": cell(learning_rates=[3, 4])}
    plan = read_plan(written(tmp_path / "plan.yaml", plan_of(parts, cells=cells, seeds=[5, 6])))
    order = [(run.cell, run.learning_rate, run.seed) for run in plan.tuning_runs()]
    assert order == [("a", 1, 5), ("b", 3, 5), ("a", 2, 5), ("b", 4, 5)]


def test_a_rate_is_chosen_when_all_were_tried_and_the_test_part_is_for_the_best_so_far(
    parts: Path, tmp_path: Path
) -> None:
    validation = {"dataset": str(parts / "rows.jsonl"), "dataset_split": "train[32:40]"}
    cells = {"a": cell(learning_rates=[1, 2, 3])}
    plan = read_plan(written(tmp_path / "plan.yaml", plan_of(parts, cells=cells, validation=validation)))
    records = Records(tmp_path / "runs.jsonl")

    def tried(rate: float, nll: float) -> bool:
        run = Run("a", rate, 0)
        record = record_of(plan, run, validation={"nll": nll})
        may_be = may_be_chosen(plan, records, run, record)
        records.put(run, record)
        return may_be

    assert [tried(1, 0.6), tried(2, 0.7)] == [True, False]
    assert chosen_rates(plan, records, plan.cells) == {}, "a rate is still to be tried"
    assert not tried(3, math.nan)
    assert chosen_rates(plan, records, plan.cells) == {"a": 1}
    assert tried(3, 0.5)
    assert chosen_rates(plan, records, plan.cells) == {"a": 3}


def test_a_plan_goes_on_from_another(parts: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    base = plan_of(parts, results=str(tmp_path / "all.jsonl"), learning_rates=[1e-3], cells={"a": {"method": "full"}})
    written(tmp_path / "base.yaml", base)
    own = {"base": str(tmp_path / "base.yaml"), "seeds": [3], "cells": {"b": {"method": "topk"}}}
    plan = read_plan(written(tmp_path / "plan.yaml", own))
    assert [*plan.cells] == ["a", "b"]
    assert plan.cells["b"].learning_rates == (1e-3,)
    assert (plan.seeds, plan.of_base, plan.records) == ((3,), {"a"}, tmp_path / "all.jsonl")
    assert read_plan(tmp_path / "base.yaml").test == plan.test
    twice = written(tmp_path / "twice.yaml", own | {"cells": {"a": {"method": "topk"}}})
    assert f"has a cell a, and so has its base {tmp_path / 'base.yaml'}: give it another name" in refusal(twice)
    round_about = written(tmp_path / "round.yaml", own | {"base": str(tmp_path / "round.yaml")})
    assert "round.yaml': write the name of another plan" in refusal(round_about)


class OneWaits:
    """A runner that trains nothing; of cell b the runs wait until all of cell a have ended."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.of_a, self.a_has_ended = plan, 4, Event()

    def perform(self, task: Task, place: Place, slot: int) -> dict[str, Any]:
        if task.run.cell == "b":
            assert self.a_has_ended.wait(60), "seeds of a wait for rates of b"
        if task.run.cell == "a":
            self.of_a -= 1
        if self.of_a == 0:
            self.a_has_ended.set()
        error = "went wrong" if task.run.cell == "c" else None
        found = {"nll": task.run.learning_rate, "completion_tokens": 1}
        judged = Judged(["r"], np.array([1.0]), np.array([1.0]), None)
        parts = {"validation": found, task.part: found}
        return record_of(self.plan, task.run, error=error, judged=judged, **parts) | {"seconds": 0.1}


def test_the_seeds_of_a_cell_wait_for_its_own_rates_alone(parts: Path, tmp_path: Path) -> None:
    validation = {"dataset": str(parts / "rows.jsonl"), "dataset_split": "train[32:40]"}
    cells = {name: cell(learning_rates=[1, 2]) for name in "abc"}
    plan = read_plan(written(tmp_path / "plan.yaml", plan_of(parts, cells=cells, validation=validation, seeds=[5, 6])))
    records, schedule = Records(tmp_path / "runs.jsonl"), Schedule([Place((), math.inf)], 3)
    runner: Any = OneWaits(plan)
    comparison = comparing.Comparison(plan, records, schedule, runner, Children([]))
    comparison.perform()
    by_cell = {name: [run for run in comparison.seen if run.cell == name] for name in "abc"}
    assert by_cell["a"] == [Run("a", 1, 5), Run("a", 2, 5), Run("a", 1, 6)]
    assert {*by_cell["b"]} == {Run("b", 1, 5), Run("b", 2, 5), Run("b", 1, 6)}
    assert {*by_cell["c"]} == {Run("c", 1, 5), Run("c", 2, 5)}, "no rate of c can be chosen"
    assert comparison.said_of_rest() == "0 of 9 runs"
    text = markdown(plan, records, collect(plan, records, chosen_rates(plan, records, plan.cells)))
    assert "| a | 1: 1.0000, 2: 2.0000 |\n" in text
    assert "| c | 1: failed, 2: failed |\n" in text


def timed(cell: str, seconds: float) -> dict[str, Any]:
    return {"cell": cell, "error": None, "seconds": seconds}


def test_what_would_take_longer_than_the_time_that_is_left_does_not_begin() -> None:
    schedule = Schedule([Place((), math.inf)], 2, time.monotonic() + 30)
    schedule.note(timed("short", 5))
    schedule.note(timed("long", 40))
    schedule.note(timed("longer", 50))
    schedule.note({"cell": "of an old file", "error": None})
    work = Worker({"short": 1, "long": 1, "unknown": 1})
    all_tasks = [*tasks("long", 2), *tasks("short", 3), *tasks("unknown", 1)]
    cells = [outcome.task.run.cell for outcome in done(schedule, all_tasks, work)]
    assert cells == ["short"] * 3
    assert sorted(task.run.cell for task in schedule.left) == ["long", "long", "unknown"]


def test_one_slow_cell_says_nothing_of_others() -> None:
    schedule = Schedule([Place((), math.inf)], 2, time.monotonic() + 20)
    for cell, seconds in (("before", 45), ("a", 5), ("b", 6), ("slow", 40)):
        schedule.note(timed(cell, seconds))
    assert len(list(done(schedule, tasks("unknown", 1), Worker({"unknown": 1})))) == 1


def test_what_goes_on_when_the_time_is_up_is_stopped_and_left() -> None:
    schedule = Schedule([Place((), math.inf)], 2, time.monotonic() + 0.3)
    stopped = Event()

    def work(task: Task, place: Place, slot: int) -> dict[str, Any]:
        assert stopped.wait(60)
        return timed(task.run.cell, 1) | {"error": "stopped" if task.run.seed == 0 else None}

    outcomes = done(schedule, tasks("a", 3), work, stopped.set)
    assert [outcome.task.run.seed for outcome in outcomes] == [1], "it ended well after all"
    assert sorted(task.run.seed for task in schedule.left) == [0, 2]


@pytest.fixture(scope="module")
def compared(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Output folder, output and errors of a comparison in which a cell fails when it is started."""
    folder = tmp_path_factory.mktemp("compared")
    cells = {"full": cell(), "ist": {"method": "ist", "learning_rates": [1e-2]}}
    plan = plan_of(parts, output=str(folder / "out"), compare_with=["full"], cells=cells)
    code, output, errors = compare(written(folder / "plan.yaml", plan))
    assert code == 1, errors[-3000:]
    return folder / "out", output, errors


def lines_of(table: str) -> Iterator[list[str]]:
    for line in table.splitlines():
        if line.startswith("| "):
            yield [text.strip() for text in line.strip("|").split(" | ")]


def lines_of_runs(path: Path) -> list[dict[str, Any]]:
    """Without those that runs have in common."""
    return [line for line in map(json.loads, path.read_text().splitlines()) if "cell" in line]


def test_a_comparison_says_what_was_learnt_and_what_it_cost(compared: tuple[Path, str, str]) -> None:
    folder, output, _ = compared
    table = (folder / "table.md").read_text()
    assert table in output
    lines = {(row[0], len(row)): row for row in lines_of(table)}
    width = len(next(lines_of(table)))
    before, full = lines["before", width], lines["full", width]
    assert float(full[3]) < float(before[3]) - 0.05
    assert full[1:3] == ["0.01", "1"]
    difference = float(lines["before", 3][1].split()[0])
    assert difference == pytest.approx(float(before[3]) - float(full[3]), abs=2e-4)
    result = json.loads((folder / "full/0.01/seed-0/result.json").read_text())
    assert result["steps"] == result["timed_steps"] == 30
    assert 0 < result["step_seconds"] < result["train_seconds"]
    assert result["trainable_parameters"] == result["parameters"] == 25172
    with (folder / "table.csv").open() as file:
        numbers = {row["cell"]: row for row in csv.DictReader(file)}
    assert float(numbers["full"]["train_seconds"]) == pytest.approx(result["train_seconds"])
    assert float(numbers["full"]["file_bytes"]) == (folder / "full/0.01/seed-0/model/model.safetensors").stat().st_size
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_failed_says_why_and_the_others_go_on(compared: tuple[Path, str, str]) -> None:
    folder, output, errors = compared
    reason = "--method ist trains LoRA or DoRA adapters: add --use_peft"
    assert "run 3 of 3" in output
    failed = next(row for row in lines_of((folder / "table.md").read_text()) if row[0] == "ist")
    assert failed[2].startswith(f"failed: ist 0.01 seed 0: {reason}")
    records = {record["cell"]: record for record in lines_of_runs(folder / "runs.jsonl")}
    assert len(records) == 3
    assert records["ist"]["error"].startswith(reason)
    assert records["full"]["error"] is None
    assert errors.strip().splitlines()[-1] == (
        "agsel: error: failed: ist 0.01 seed 0; the same command tries them again"
    )


@pytest.mark.slow
def test_a_comparison_in_portions_repeats_nothing_and_its_tables_come_from_the_file_of_results_alone(
    parts: Path, tmp_path: Path
) -> None:
    """In a folder of its own each, as on machines whose disk is lost; what runs did is read from their folders, too."""
    results = tmp_path / "all.jsonl"
    first = plan_of(
        parts,
        output=str(tmp_path / "first"),
        results=str(results),
        evaluate={"max_new_tokens": 4},
        settings={"max_steps": 10},
        other={"dataset": str(parts / "rows.jsonl"), "dataset_split": "train[32:40]"},
        compare_with=["full"],
        cells={"full": cell()},
    )
    second = {"base": str(tmp_path / "first.yaml"), "output": str(tmp_path / "second")}
    second["cells"] = {"topk": {"method": "topk", "learning_rates": [1e-2]}}
    written(tmp_path / "second.yaml", second)
    code, output, errors = compare(written(tmp_path / "first.yaml", first), "--minutes", "0.0001")
    assert code == 0, errors[-3000:]
    assert "left      2 of 2 runs: no time for more" in output
    assert not results.exists()
    code, _, errors = compare(tmp_path / "first.yaml")
    assert code == 0, errors[-3000:]
    kept = results.read_text()
    assert str(tmp_path) not in kept.replace(str(parts), ""), "no folder of this machine but those of the plan"
    code, output, errors = compare(tmp_path / "second.yaml", "--minutes", "60")
    assert code == 0, errors[-3000:]
    assert set(kept.splitlines()) < set(results.read_text().splitlines())
    assert "run 3 of 3: topk" in output
    assert not (tmp_path / "second/full").exists()

    tables = (tmp_path / "second/table.md").read_text()
    numbers = (tmp_path / "second/table.csv").read_text()
    (tmp_path / "second").rename(tmp_path / "away")
    code, output, errors = compare(tmp_path / "second.yaml", "--tables")
    assert code == 0, errors[-3000:]
    assert tables in output
    assert (tmp_path / "second/table.csv").read_text() == numbers
    assert {path.name for path in (tmp_path / "second").iterdir()} == {"table.md", "table.csv", "pareto.png"}

    line = next(line for line in csv.DictReader(numbers.splitlines()) if line["cell"] == "topk")
    folders = [tmp_path / "away/topk/0.01/seed-0", tmp_path / "first/full/0.01/seed-0"]
    topk, full = (Judged.read(folder / "test.jsonl") for folder in folders)
    nll, share = differences.nll_difference(topk, full), differences.accuracy_difference(topk, full)
    assert share is not None
    for name in ("difference", "low", "high"):
        rounding = 2 * 0.5 * 10**-records.DECIMALS
        assert float(line[f"nll - full: {name}"]) == pytest.approx(getattr(nll, name), abs=rounding)
        assert float(line[f"accuracy - full: {name}"]) == pytest.approx(getattr(share, name))
    other = json.loads((tmp_path / "away/topk/0.01/seed-0/other.json").read_text())
    assert float(line["other_nll"]) == pytest.approx(other["nll"])
    assert float(line["other_accuracy"]) == other["accuracy"]


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_ends_as_an_unbroken_one(parts: Path, tmp_path: Path) -> None:
    """Its runs notice and save; those that have ended are not repeated; the weights are those of a plain run."""
    out = tmp_path / "out"
    settings = {"save_strategy": "steps", "save_steps": 20, "logging_steps": 1, "max_steps": 600}
    cells = {"full": cell(max_steps=5), "topk": {"method": "topk", "learning_rates": [1e-3]}}
    changed = {
        "output": str(out),
        "settings": settings,
        "cells": cells,
        "runs_per_gpu": 1,
    }  # `full` ends, `topk` begins
    plan = written(tmp_path / "plan.yaml", plan_of(parts, **changed))
    first = start(plan)
    until = time.monotonic() + 300
    log = out / "topk/0.001/seed-0/train.log"
    while not ("full" in _tested(out) and _has(log, "step  21/600")):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    ended = (out / "full/0.01/seed-0/result.json").stat().st_mtime_ns
    code, output, errors = compare(plan)
    assert code == 0, errors[-3000:]
    assert (out / "full/0.01/seed-0/result.json").stat().st_mtime_ns == ended
    result = json.loads((out / "topk/0.001/seed-0/result.json").read_text())
    assert result["steps"] == 600
    assert 0 < result["timed_steps"] < 600, "it went on from a checkpoint"
    assert "run 3 of 3: topk" in output
    first_losses = {_first_loss(out / run / "seed-0/train.log") for run in ("full/0.01", "topk/0.001")}
    assert len(first_losses) == 1, "the same weights and the same first batch"

    words = [sys.executable, TRAIN, "--config", out / "shared.yaml", "--method", "topk", "--learning_rate", "0.001"]
    words += ["--seed", "0", "--output_dir", tmp_path / "plain"]
    subprocess.run([*map(str, words)], env=environment(), check=True, capture_output=True)
    went_on, plain = (
        load_file(run / "model/model.safetensors") for run in (out / "topk/0.001/seed-0", tmp_path / "plain")
    )
    assert all(torch.equal(went_on[name], plain[name]) for name in plain)


def _first_loss(log: Path) -> str:
    found = re.search(r"step +1/\d+  epoch \S+  loss (\S+)", log.read_text())
    assert found is not None
    return found[1]


def _tested(out: Path) -> set[str]:
    """Cells with a run that has ended."""
    lines = lines_of_runs(out / "runs.jsonl") if (out / "runs.jsonl").is_file() else []
    return {record["cell"] for record in lines if "test" in record}


def _has(path: Path, text: str) -> bool:
    return path.is_file() and text in path.read_text()


@pytest.mark.slow
def test_the_best_rate_is_chosen_on_the_validation_part_and_a_stopped_comparison_says_how_to_go_on(
    parts: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 " * 30)
    plan = plan_of(
        parts,
        output=str(tmp_path / "out"),
        validation={"dataset": str(parts / "rows.jsonl"), "dataset_split": "train[32:40]"},
        forgetting=str(tmp_path / "text.txt"),
        seeds=[0, 1],
        cells={"full": cell(learning_rates=[1e-6, 1e-2])},
    )
    stopped = start(written(tmp_path / "plan.yaml", plan))
    while not list((tmp_path / "out").glob("full/*/seed-0/train.log")):
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.communicate(timeout=100)[1].strip().splitlines()[-1] == (
        "agsel: error: stopped by a signal: go on with the same command"
    )
    code, output, errors = compare(tmp_path / "plan.yaml")
    assert code == 0, errors[-3000:]
    full = next(row for row in lines_of(output) if row[0] == "full")
    assert full[1:3] == ["0.01", "2"]
    assert " ± " in full[3]
    assert full[-1][0] in "+-", "forgetting, and nothing of another task"
    records = lines_of_runs(tmp_path / "out/runs.jsonl")
    tested = {(record["learning_rate"], record["seed"]) for record in records if "test" in record}
    assert tested >= {(0, 0), (1e-2, 0), (1e-2, 1)}
    assert (1e-6, 1) not in tested
    assert "run 4 of 4" in output


@pytest.mark.slow
def test_methods_with_rates_and_stages_on_two_ranks(parts: Path, tmp_path: Path) -> None:
    heldout = ("--heldout", save_rows(tmp_path / "heldout.jsonl", 8))
    results = ("--output", "results")
    runs = ("--runs", "full:1e-2", "topk:1e-2:3")
    code, _, errors = compare("--config", parts / "recipe.yaml", *heldout, *results, *runs, folder=tmp_path)
    assert code == 0, errors[-3000:]
    table = list(lines_of((tmp_path / "results/table.md").read_text()))[2:]
    assert [row[0] for row in table] == ["before", "full-1e-2-zero2", "topk-1e-2-zero3"]
    before, full, topk = (float(row[3]) for row in table)
    assert full < before - 0.1
    assert topk < before - 0.1
    config = yaml.safe_load((tmp_path / "results/topk-1e-2-zero3/0.01/seed-42/config.yaml").read_text())
    assert config["deepspeed"]["zero_optimization"]["stage"] == 3
    assert config["method"] == "topk"
