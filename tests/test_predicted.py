"""Predicted against measured step times, and a plan's prediction on the command line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import REPOSITORY
from tools import plan_memory
from tools.bench import predicted
from tools.bench.configurations import Configuration
from tools.bench.plans import expand

PLAN = ["--model", "tiny", "--gpus", "16", "--gpus_per_host", "8", "--micro_batch", "2", "--sequence", "64"]


def row(method: str, ms: float, **changed: Any) -> dict[str, Any]:
    fields = {"model": "tiny", "stage": 2, "ranks": 2, "micro_batch": 2, "sequence": 64}
    origin = {"date": "today", "device": "2 x GPU", "versions": "some", "command": "bench"}
    configuration = Configuration(**fields | {"method": method} | changed)
    return asdict(configuration) | origin | {"error": None, "ms_per_step": ms}


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def test_one_row_of_a_model_is_fitted_and_the_others_are_held_against_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("full", 400), row("full", 250, ranks=1), row("exploit", 100), row("lora-16", 1)]
    slowness = predicted.speeds_of(rows[1]).slowness
    twice = predicted.predicted(Configuration(**asdict_of(rows[1])), predicted.speeds_of(row("full", 500, ranks=1)))
    assert twice.total == pytest.approx(0.5)
    predicted.main([str(written(tmp_path, *rows))])
    shown = capsys.readouterr().out
    assert shown.strip() == (tmp_path / "predicted.md").read_text().strip()
    assert "| full | 250 | 250 | fitted |" in shown
    assert f"slowness {slowness:.2f}" in shown
    exploit = 1000 * predicted.predicted(Configuration(**asdict_of(rows[2])), predicted.speeds_of(rows[1])).total
    assert f"| exploit | 100 | {exploit:.0f} | {exploit / 100:.2f} |" in shown
    assert "of 2 rows within 20 %" in shown
    assert "lora" not in shown


def asdict_of(measured: dict[str, Any]) -> dict[str, Any]:
    return {name: measured[name] for name in asdict(Configuration(model="tiny", stage=2, method="full"))}


def test_without_a_row_of_full_fine_tuning_nothing_can_be_fitted(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no row of full fine-tuning of tiny .*--methods full --ranks 1$"):
        predicted.main([str(written(tmp_path, row("exploit", 100)))])


def test_the_plan_for_it_has_rows_of_8_x_2048_on_one_gpu_and_two() -> None:
    configurations = expand(yaml.safe_load((REPOSITORY / "tools" / "bench_predicted.yaml").read_text()))
    assert len(configurations) == 20
    assert {(one.micro_batch, one.sequence) for one in configurations} == {(8, 2048)}
    assert {(one.ranks, one.stage) for one in configurations} == {(1, 2), (1, 3), (2, 2), (2, 3)}


def test_a_plan_says_what_is_sent_and_how_long_a_step_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_memory.main([*PLAN, "--stage", "3"])
    lines = capsys.readouterr().out.splitlines()
    begun = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert begun == ["memory", "host", "fits", "traffic", "time", "hides", "saves", "states"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[lines.index(start(lines, "time")) :]}
    total, forward, backward, update, *_, waiting = map(float, cells["exploit"])
    assert total == pytest.approx(forward + backward + update + waiting, abs=0.3)
    plan_memory.main([*PLAN, "--calibrate", str(written(tmp_path, row("full", 4000)))])
    slower = start(capsys.readouterr().out.splitlines(), "saves")
    assert slower.startswith("saves ")


def start(lines: list[str], word: str) -> str:
    return next(line for line in lines if line.startswith(word))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--gpus", "12"], "gpus must be a multiple of gpus_per_host, 8, got 12 (--gpus)"),
        (["--link_gbs", "0"], "link_gbs must be a number above 0, got 0 (--link_gbs)"),
        (["--network_gbs", "-1"], "network_gbs must be a number above 0, got -1 (--network_gbs)"),
        (["--host_gbs", "nan"], "host_gbs must be a number above 0, got nan (--host_gbs)"),
        (["--tflops", "0"], "tflops must be a number above 0, got 0 (--tflops)"),
        (["--calibrate", "nowhere"], "nowhere has no rows.jsonl: measure first, tools/bench.py --output nowhere"),
        (["--calibrate", "nowhere", "--tflops", "500"], "use --tflops or --calibrate"),
    ],
)
def test_a_wrong_option_is_one_line(wrong: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan_memory.main([*PLAN, *wrong])
    assert str(stopped.value).startswith("agsel: error: ")
    assert words in str(stopped.value)
    assert "\n" not in str(stopped.value)
