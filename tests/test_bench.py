"""tools/bench.py: one real launch on the CPU that measures several methods, and the arithmetic behind its table."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

import agsel
from agsel.errors import UserError
from agsel.planning.flops import flops_per_token
from agsel.planning.shapes import MODEL_SHAPES
from agsel.policies import BlockInfo
from tests.distributed import REPOSITORY, environment, kill_session
from tests.tiny import tiny_model
from tools import plan_memory
from tools.bench import command, scaling, scaling_picture, scoring
from tools.bench.chosen_weights import linear_layers, random_mask
from tools.bench.compared_methods import METHODS
from tools.bench.configurations import Configuration
from tools.bench.freezing import UpperLayers, mean_of_a_run
from tools.bench.picture import draw_group
from tools.bench.plans import expand, read_plan
from tools.bench.rows import configuration_of, median_row, read_rows
from tools.bench.series import Series, strong_scaling, weak_scaling
from tools.bench.starters import add_shira, add_supertuning, expected_set
from tools.bench.stopwatch import Settings, Stopwatch
from tools.bench.table import COLUMNS, table

PLAN = """
- {models: tiny, stages: 2, methods: [full, bound, exploit, explore, lisa, trainer, lora-16]}
- {models: tiny, stages: 3, methods: [full-layers, bound, exploit]}
- {models: tiny, stages: 2, methods: badam, checkpointing: on}
- {models: tiny, stages: 1, methods: full, ranks: 1}
- {models: tiny, stages: 2, methods: exploit-elements, densities: 0.1, ranks: 1}
- {models: tiny, stages: 3, methods: elements, densities: 0.1, ranks: 1}
- {models: tiny, stages: 2, methods: [supertuning, shira], densities: 0.1, ranks: 1}
- {models: tiny, stages: 2, methods: freezeout-lora-128-folded, fractions: [1, 0.4], ranks: 1}
"""
SCORING = "tools/bench_scoring.py"
STEPS = 4
FEATURES = {
    field.name: field.default for field in fields(Configuration) if field.name not in ("model", "stage", "method")
}
PHASES = ["forward_ms", "backward_ms", "step_ms"]
TIMES = ["ms_per_step", "ms_p10", "ms_p90", *PHASES, "tokens_per_second"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the command leaves behind."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "plan.yaml").write_text(PLAN)
    beside = ("--shapes", "2x16", "--steps", STEPS, "--warmup", 2, "--profile")
    run("--plan", folder / "plan.yaml", "--output", folder, *beside)
    return folder


def run(*arguments: object, tool: str = "tools/bench.py") -> str:
    process = subprocess.Popen(
        [sys.executable, tool, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        kill_session(process.pid)
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["method"], row["stage"]): row for row in read_rows(folder / "rows.jsonl")}


def test_every_configuration_is_measured(rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert len(rows) == 17
    for row in rows.values():
        if row["method"] != "badam":
            assert row["error"] is None
            assert [name for name in TIMES if row[name] is None] == (PHASES if row["method"] == "trainer" else [])
            assert all(math.isfinite(row[name]) and row[name] > 0 for name in TIMES if row[name] is not None), row
            assert row["ms_p10"] <= row["ms_per_step"] <= row["ms_p90"]


def test_a_run_through_launch_train_leaves_nothing_behind(folder: Path) -> None:
    assert not (folder / "trainer").exists()


def test_each_number_of_ranks_has_a_launch_of_its_own(rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert {(row["ranks"], row["device"]) for row in rows.values()} == {(1, "1 x CPU"), (2, "2 x CPU")}


def test_a_configuration_that_cannot_run_says_why(rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert rows["badam", 2]["error"] == "UserError: the badam package supports ZeRO-3, or one GPU without DeepSpeed"


def test_states_move_only_when_the_set_changes(rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    """At most one layer comes and one goes per step, fewer where one is drawn again."""
    most = 2 * 3 * 4 * weights_of_a_layer() / 2  # two directions; three states of 4 bytes; split over 2 ranks
    for stage in (2, 3):
        assert 0 < rows["exploit", stage]["moved_bytes_per_step"] <= most
        assert rows["bound", stage]["moved_bytes_per_step"] == 0
        assert rows["bound", stage]["exposed_ms"] is None
    assert rows["lisa", 2]["moved_bytes_per_step"] == 0  # its set is 20 steps old before it changes
    assert rows["full", 2]["moved_bytes_per_step"] == 0


def weights_of_a_layer() -> int:
    """Weights of one layer of the tiny shape."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODEL_SHAPES["tiny"]())
    return sum(parameter.numel() for parameter in model.model.layers[0].parameters())


def test_skipped_steps_are_no_measurement(tmp_path: Path) -> None:
    settings = Settings(steps=2, warmup=1, profile=False, folder=tmp_path)
    policy = SimpleNamespace(step=0)
    stopwatch = Stopwatch(Configuration(model="tiny", stage=2, method="exploit"), settings)
    stopwatch.begin(tiny_model(), SimpleNamespace(policy=policy, residency=None))
    for policy.step in (0, 1):
        stopwatch.mark("step")
        stopwatch.end_of_step()
    stopwatch.mark("step")
    with pytest.raises(ValueError, match="2 of 3 steps were skipped"):
        stopwatch.end_of_step()


def test_profiles_are_of_the_training_step(folder: Path) -> None:
    profile = (folder / "profile-tiny-ZeRO-2-2-x-16-2-ranks-exploit.txt").read_text()
    assert "selective_step.py" in profile
    assert "Ordered by: cumulative time" in profile
    assert "Ordered by: internal time" in profile


def test_table_has_every_row_and_its_ratios(folder: Path, rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    lines = (folder / "table.md").read_text().splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith(("| exploit |", "| explore |"))
    ]
    exploit, bound, full = (rows[method, 2]["ms_per_step"] for method in ("exploit", "bound", "full"))
    assert [row[0] for row in cells] == ["exploit", "explore", "exploit"]
    assert all(len(row) == len(COLUMNS) for row in cells)
    named = dict(zip(COLUMNS, cells[0], strict=True))
    assert named["time / bound"] == f"{exploit / bound:.3f}"
    assert named["full / time"] == f"{full / exploit:.2f}"
    assert cells[2][COLUMNS.index("full / time")] == "-"  # stage 3 has no row of full fine-tuning
    assert "- badam: UserError" in "\n".join(lines)
    assert f"--plan {folder}" in lines[-1]


def test_picture_is_a_png_and_is_made_again(folder: Path) -> None:
    picture, table = folder / "bench.png", folder / "table.md"
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = table.read_text()
    picture.unlink()
    table.unlink()
    run("--output", folder, "--table_only")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert table.read_text() == before


@pytest.mark.parametrize(("layers", "fraction"), [(24, 0.3), (16, 0.5), (32, 0.1), (6, 0.3)])
def test_expected_set_is_the_mean_of_random_sets(layers: int, fraction: float) -> None:
    chosen = expected_set(layers, fraction)
    draw = np.random.default_rng(0)
    means = np.mean([sorted(draw.permutation(layers)[: len(chosen)]) for _ in range(20_000)], axis=0)
    assert len(chosen) == max(1, int(fraction * layers))
    assert np.abs(np.array(chosen) - means).max() < 0.5 + 0.1  # rounded; the means are of 20,000 draws


def test_flops_are_those_that_torch_counts() -> None:
    """Against torch's own counter, with attention as plain products: it counts the square, the formula half of it."""
    from torch.utils.flop_counter import FlopCounterMode

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    rows, sequence = 2, 16
    ids = torch.randint(97, (rows, sequence))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    other_half = 6 * 3 * 48 * sequence
    expected = rows * sequence * (flops_per_token(model, sequence) + other_half)
    rotary_table = sequence * 48 // 4  # a product of positions and head size / 2 frequencies, once per forward
    assert counter.get_total_flops() == expected + rotary_table


def test_the_arithmetic_of_layers_that_are_no_linear_ones_counts() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=97))
    products = 2 * 12 * 16**2 + 97 * 16
    assert flops_per_token(model, 8) == 6 * products + 6 * 2 * 16 * 8


def test_options_multiply_and_what_a_method_ignores_is_measured_once() -> None:
    options = {"models": "tiny", "stages": [2, 3], "methods": ["full", "exploit"], "fractions": [0.1, 0.2]}
    configurations = expand([options, options | {"liger": "loss", "stages": 2, "methods": "bound"}])
    found = [(c.stage, c.method, c.fraction, c.liger) for c in configurations]
    for stage in (2, 3):
        assert [row for row in found if row[:2] == (stage, "full")] == [(stage, "full", 0.3, "none")]
        assert (stage, "exploit", 0.1, "none") in found
        assert (stage, "exploit", 0.2, "none") in found
    assert found[-2:] == [(2, "bound", 0.1, "loss"), (2, "bound", 0.2, "loss")]
    assert len(found) == 8


def test_a_density_is_read_by_methods_of_single_weights_and_named_where_it_is_unusual() -> None:
    options = {"models": "tiny", "stages": 2, "methods": ["full", "elements"], "densities": [0.01, 0.001]}
    assert [one.label for one in expand([options])] == ["full", "elements", "elements, density 0.1%"]


def test_a_row_from_before_an_option_has_its_default() -> None:
    row = FEATURES | {"model": "tiny", "stage": 2, "method": "full"}
    del row["density"]
    assert configuration_of(row) == Configuration(model="tiny", stage=2, method="full")


def test_peft_trains_as_many_weights_as_elements_do() -> None:
    """SHiRA nearly as many: whole ranks. With more than 20 matrices of a rank PEFT shortens their names."""
    density = 0.1
    model = deep_model()
    weights = sum(layer.weight.numel() for layer in linear_layers(model).values())
    assert random_mask(model, density).numel == pytest.approx(density * weights, rel=0.01)
    assert trained(add_supertuning(model, density)) == pytest.approx(density * weights, rel=0.01)
    model = add_shira(deep_model(), density)
    assert trained(model) == pytest.approx(density * weights, rel=0.1)
    assert len([p for p in model.parameters() if p.requires_grad]) == len(linear_layers(deep_model()))


def deep_model() -> Any:
    return AutoModelForCausalLM.from_config(MODEL_SHAPES["tiny"](num_hidden_layers=24))


def trained(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({1.0: 30.0, 0.5: 20.0, 0.001: 10.02}, 30 - 20 * (0.6 - 0.6 * 0.6 ** (2 / 3) * 3 / 5)),  # by what is trained
        ({1.0: 9.0, 0.75: 3.0, 0.001: 3.0}, 3 + 6 * 0.25 ** (2 / 3) * 3 / 5),  # 6 (1 - 4 t^1.5), until it is 0
    ],
)
def test_a_run_of_freezeout_takes_the_mean_of_its_moments(times: dict[float, float], expected: float) -> None:
    assert mean_of_a_run(times) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("times", [{}, {1.0: 5.0}, {1.0: 5.0, 0.5: 3.0}, {0.75: 4.0, 0.25: 2.0}])
def test_moments_that_leave_out_the_start_or_the_end_tell_no_mean(times: dict[float, float]) -> None:
    assert mean_of_a_run(times) is None


def test_the_table_tells_the_mean_of_a_run_from_its_own_moments(rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Not from those of another method, depth or setting, nor from those that failed."""
    measured = rows["freezeout-lora-128-folded", 2]

    def line(**changes: Any) -> list[str]:
        moments = [
            measured | {"fraction": 1.0, "ms_per_step": 30.0},
            measured | {"fraction": 0.25, "ms_per_step": 15.0},
        ]
        text = table([*moments, *(measured | {"fraction": 0.5, "ms_per_step": 25.0} | changes,)], 989.0)
        return [line for line in text.splitlines() if "mean of a run" in line]

    of_two = mean_of_a_run({1.0: 30.0, 0.25: 15.0})
    of_three = mean_of_a_run({1.0: 30.0, 0.5: 25.0, 0.25: 15.0})
    said = "- freezeout-lora-128-folded, the mean of a run, interpolated between its rows: {:.1f} ms/step"
    assert line() == [said.format(of_three)] != [said.format(of_two)]
    assert (
        table([measured | {"method": "fixed", "fraction": at} for at in (1.0, 0.3)], 989.0).count("mean of a run") == 0
    )
    for other in (
        {"method": "freezeout-lora-256-folded"},
        {"method": "fixed"},
        {"select_from": 0.5},
        {"offload_states": False},
        {"micro_batch": 3},
        {"error": "out of memory"},
    ):
        assert line(**other) == [said.format(of_two)], other


def test_what_was_measured_tells_what_a_run_takes(folder: Path) -> None:
    lines = [line for line in (folder / "table.md").read_text().splitlines() if "mean of a run" in line]
    assert [line.split(",")[0] for line in lines] == ["- freezeout-lora-128-folded"]


@pytest.mark.parametrize(("fraction", "lowest"), [(1.0, 0), (0.75, 6), (0.5, 12), (0.05, 23)])
def test_the_upper_layers_are_trained(fraction: float, lowest: int) -> None:
    policy = UpperLayers(fraction=fraction).started([BlockInfo(f"layers.{index}", 1) for index in range(24)])
    assert policy.plan().trainable == {*range(lowest, 24)}


def test_what_is_frozen_is_what_freezeout_freezes() -> None:
    """A layer more or less for a moment, as one rounds down and the other to the nearest."""
    blocks = [BlockInfo(f"layers.{index}", 1) for index in range(24)]
    rule = agsel.FreezeOut(freeze_steps=100).started(blocks)
    for step in range(100):
        moment = UpperLayers(fraction=1 - min((step / 100) ** 1.5, 0.6)).started(blocks)
        trained, expected = moment.plan().trainable, rule.plan().trainable
        assert trained == {*range(min(trained), 24)}
        assert abs(min(trained) - min(expected)) <= 1
        rule.commit({})


@pytest.mark.parametrize(("times", "expected"), [([5.0], 5.0), ([9.0, 7.0], 7.0), ([3.0, 9.0, 7.0], 7.0)])
def test_of_several_rounds_the_median_counts(times: list[float], expected: float) -> None:
    failed = {"error": "out of memory"}
    rows = [failed, *({"error": None, "ms_per_step": time} for time in times), failed]
    assert median_row(rows)["ms_per_step"] == expected
    assert median_row([failed]) == failed


def test_the_plan_of_the_readme_is_one() -> None:
    configurations = expand(yaml.safe_load((REPOSITORY / "tools" / "bench.yaml").read_text()))
    assert len(configurations) == 155
    assert {configuration.method for configuration in configurations} == set(METHODS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": "tiny", "stages": 2, "methods": "full", "liger": "some"}, "unknown value 'some'.*--liger"),
        ({"models": "tiny", "stages": 2, "methods": "full", "liger": "all", "compile": "on"}, "use --liger loss"),
        ({"models": "tiny", "stages": 2, "methods": "fool"}, "unknown method 'fool'"),
        ({"models": "tiny", "stages": 2, "methods": "full", "ranks": 0}, "ranks must be at least 1, got 0"),
        ({"models": "tiny", "stages": 2, "methods": "elements", "densities": 0}, "density must be above 0"),
        ({"models": "tiny", "stages": 2, "methods": "exploit", "fractions": 2}, "fraction must be above 0"),
        ({"models": "tiny", "stages": 2, "methods": "full", "accumulation": 0}, "accumulation must be at least 1"),
        ({"models": "tiny", "stages": 4, "methods": "full"}, "stage must be 1, 2 or 3, got 4"),
        ({"models": "tiny", "stage": 2, "methods": "full"}, "unknown option 'stage' in the plan"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand([options])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "fool"), "unknown method 'fool' (--methods)"),
        (("--models", "tiny", "nowhere"), "no model 'nowhere' (--models): neither qwen2.5-0.5b, "),
        (("--ranks", "0"), "ranks must be at least 1, got 0 (--ranks)"),
        (("--liger", "all", "--compile", "on"), "use --liger loss, or --compile off"),
        (("--shapes", "8"), "'8' is no shape (--shapes)"),
        (("--shapes", "0x512"), "'0x512' is no shape (--shapes)"),
        (("--steps", "0"), "steps must be at least 1, got 0 (--steps)"),
        (("--warmup", "-1"), "warmup must be at least 0, got -1 (--warmup)"),
        (("--rounds", "0"), "rounds must be at least 1, got 0 (--rounds)"),
        (("--plan", "nowhere.yaml"), "no such file: nowhere.yaml (--plan)"),
        (("--plan", "README.md"), "README.md is no"),
        (
            ("--plan", "tools/bench_scaling.yaml", "--ranks", "2"),
            "bench_scaling.yaml (--plan) has ranks: leave out --ranks",
        ),
        (("--table_only",), "has no rows.jsonl: measure first"),
    ],
)
def test_mistakes_end_in_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--output", str(tmp_path / "new"), *arguments])
    assert stop.value.code.startswith("agsel: error: ")
    assert message in stop.value.code
    assert "\n" not in stop.value.code
    assert not (tmp_path / "new").exists()


def test_why_the_ranks_could_not_start_is_said_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/bench.py", "--models", "tiny", "--methods", "full", "--output", str(tmp_path)],
        env=environment() | {"TORCH_EXTENSIONS_DIR": "/proc/nowhere"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("agsel: error: ")]
    assert "cannot use /proc/nowhere for compiled operators" in said
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("plan", ["{models: tiny}", "- tiny", "- {models: tiny, stages: 2}", "- {1: tiny}"])
def test_a_plan_that_is_none_is_refused(plan: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(plan)
    with pytest.raises(ValueError, match="plan"):
        expand(read_plan(tmp_path / "plan.yaml"))


@pytest.mark.slow
def test_scoring_is_measured_in_turns_with_training(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n' * 5)
    text = "".join(chr(code) for code in range(32, 127))
    tokenizer = Tokenizer(models.WordLevel({character: index for index, character in enumerate(text)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~").save_pretrained(tmp_path / "tokenizer")
    options = {"model": "tiny", "dataset": rows, "tokenizer": tmp_path / "tokenizer", "rows": 9, "micro_batch": 2}
    options |= {"output": tmp_path, "rounds": 2}
    output = run(*[part for name, value in options.items() for part in (f"--{name}", value)], tool=SCORING)
    row = json.loads((tmp_path / "scoring.jsonl").read_text())
    assert (row["rows"], row["tokens"], row["batches"], row["device"]) == (5, 5 * len("1 + 1?\n2~"), 3, "1 x CPU")
    assert [len(row[f"{name}_ms"]) for name in ("training", "scoring")] == [2, 2]
    assert f"ratio {scoring.ratio(row):.3f}" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "best"), "there is no method 'best'"),
        (("--density", "0"), "got 0 (--element_density)"),
        (("--rounds", "0"), "rounds must be at least 1, got 0 (--rounds)"),
        (("--rows", "1", "--ranks", "2"), "1 rows are too few for 2 ranks (--rows)"),
        (("--dataset", "rows.jsonl"), "a dataset needs a tokenizer"),
    ],
)
def test_mistakes_of_scoring_end_in_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        scoring.main(["--output", str(tmp_path / "new"), *arguments])
    assert stop.value.code.startswith("agsel: error: ")
    assert message in stop.value.code
    assert not (tmp_path / "new").exists()


OF_NO_METHOD = '{"method": "fool", "model": "tiny", "stage": 2}'


@pytest.mark.parametrize("line", ['{"method": ', "{}", "[1]", "3", OF_NO_METHOD])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"^line 1 of .*rows.jsonl is no row: remove it"):
        read_rows(tmp_path / "rows.jsonl")


def test_scaling_without_rows_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^agsel: error: .* has no rows.jsonl"):
        scaling.main([str(tmp_path)])


@pytest.mark.parametrize("option", ["gpus", "gpus_per_host", "micro_batch", "sequence", "accumulation"])
def test_a_memory_plan_of_nothing_is_refused(option: str) -> None:
    with pytest.raises(SystemExit, match=rf"^agsel: error: {option} must be at least 1, got 0 \(--{option}\)"):
        plan_memory.main(["--model", "qwen2.5-0.5b", f"--{option}", "0"])


def test_bars_end_at_the_median_step_and_names_of_agsel_are_bold() -> None:
    from matplotlib.figure import Figure

    phases = {"forward_ms": 20.0, "backward_ms": 60.0, "step_ms": 40.0}
    shared = {"model": "tiny", "stage": 2, "peak_bytes": 10**9}
    full = FEATURES | shared | phases | {"method": "full", "ms_per_step": 100.0}
    trainer = FEATURES | shared | dict.fromkeys(phases) | {"method": "trainer", "ms_per_step": 50.0}
    times, memory = Figure().subplots(1, 2)
    draw_group(times, memory, "title", [full, trainer])
    ends = [max(bar.get_x() + bar.get_width() for bar in bars) for bars in zip(*times.containers, strict=True)]
    assert ends == pytest.approx([100, 50])
    assert [bars[0].get_width() for bars in times.containers[:3]] == pytest.approx([100 / 6, 50, 100 / 3])
    assert [label.get_fontweight() for label in times.get_yticklabels()] == ["normal", "bold"]


def test_titles_of_scaling_say_what_stays_the_same() -> None:
    def series(ranks: int, micro_batch: int) -> Series:
        one = Configuration(model="tiny", stage=2, method="full", ranks=ranks, micro_batch=micro_batch)
        return Series(one, {})

    assert scaling_picture.title("weak", [series(1, 8)]) == "weak: 8 rows per GPU"
    assert scaling_picture.title("strong", [series(1, 32), series(2, 16)]) == "strong: 32 rows in all"
    assert scaling_picture.title("weak", [series(1, 8), series(1, 4)]) == "weak: equal rows per GPU"


def test_stages_differ_in_their_markers_and_the_ideal_grows_with_the_gpus() -> None:
    from matplotlib.figure import Figure

    series = []
    for stage, speed in ((1, 1000), (2, 3000)):
        one = Configuration(model="tiny", stage=stage, method="full", ranks=1)
        rows = {1: {"tokens_per_second": speed}, 4: {"tokens_per_second": speed / 2}}
        series.append(Series(one, rows))
    axis = Figure().subplots()
    scaling_picture.draw_model(axis, series)
    ideals = [line for line in axis.lines if line.get_label() == scaling_picture.IDEAL]
    measured = [line for line in axis.lines if line not in ideals]
    assert [(line.get_xy1(), line.get_xy2()) for line in ideals] == [((0, 0), (1, 1)), ((0, 0), (1, 3))]
    assert [list(line.get_ydata()) for line in measured] == [[1, 2], [3, 6]]
    assert len({line.get_marker() for line in measured}) == 2


def test_lines_tell_full_fine_tuning_and_states_that_stay_apart() -> None:
    from matplotlib.figure import Figure

    shared = {"model": "tiny", "stage": 2, "ranks": 1}
    drawn = [
        Configuration(method="full", **shared),
        Configuration(method="exploit", **shared),
        Configuration(method="exploit", offload_states=False, **shared),
    ]
    rows = {1: {"tokens_per_second": 1000}, 2: {"tokens_per_second": 900}}
    axis = Figure().subplots()
    scaling_picture.draw_model(axis, [Series(one, rows) for one in drawn])
    measured = [line for line in axis.lines if line.get_label() != scaling_picture.IDEAL]
    assert [line.get_linestyle() for line in measured] == ["--", "-", ":"]


def test_ranks_multiply_too_and_are_compared_in_groups_of_their_own() -> None:
    one, four = expand([{"models": "tiny", "stages": 2, "methods": "full", "ranks": [1, 4]}])
    assert (one.ranks, four.ranks) == (1, 4)
    assert one.setting.endswith(", 1 rank")
    assert four.setting.endswith(", 4 ranks")


MILLISECONDS = {  # label, ranks, rows of a micro-batch
    ("full", 1, 8): 100.0,
    ("full", 2, 8): 125.0,
    ("full", 4, 8): 160.0,
    ("full", 1, 32): 300.0,
    ("full", 2, 16): 200.0,
    ("exploit", 1, 8): 50.0,
    ("exploit", 4, 8): 40.0,
    ("exploit", 1, 32): 120.0,
    ("exploit 20%", 1, 8): 40.0,
    ("exploit 20%", 4, 8): 32.0,
    ("exploit, no offload", 1, 8): 40.0,
    ("exploit, no offload", 4, 8): 50.0,
}


@pytest.fixture
def on_more_gpus(rows: dict[tuple[str, int], dict[str, Any]], tmp_path: Path) -> Path:
    """Rows of a real run, with other numbers of ranks, micro-batches and times."""
    with (tmp_path / "rows.jsonl").open("w") as file:
        for (method, ranks, micro_batch), time in MILLISECONDS.items():
            changed = {"ranks": ranks, "micro_batch": micro_batch, "ms_per_step": time}
            changed |= {"forward_ms": time / 2, "backward_ms": None if micro_batch == 16 else 10.0}
            changed |= {"fraction": 0.2} if method.endswith("20%") else {}
            changed |= {"offload_states": False} if method.endswith("no offload") else {}
            changed["tokens_per_second"] = 1000 * micro_batch * 16 / time
            file.write(json.dumps(rows[method.removesuffix(" 20%").removesuffix(", no offload"), 2] | changed) + "\n")
    return tmp_path


def test_efficiency_is_against_the_fewest_gpus(on_more_gpus: Path) -> None:
    measured = read_rows(on_more_gpus / "rows.jsonl")
    full, exploit, *_ = weak_scaling(measured)
    assert (full.configuration.method, list(full.rows)) == ("full", [1, 2, 4])
    assert [full.efficiency(ranks) for ranks in (1, 2, 4)] == pytest.approx([1, 100 / 125, 100 / 160])
    assert [exploit.efficiency(ranks) for ranks in (1, 4)] == pytest.approx([1, 50 / 40])
    assert [full.efficiency_of_gradients(ranks) for ranks in (1, 2, 4)] == pytest.approx([1, 60 / 72.5, 60 / 90])
    full, exploit = strong_scaling(measured)
    assert full.efficiency_of_gradients(2) is None
    assert [full.efficiency(ranks) for ranks in (1, 2, 4)] == pytest.approx([1, 300 / (2 * 200), 300 / (4 * 160)])
    assert exploit.efficiency(4) == pytest.approx(120 / (4 * 40))


def test_scaling_is_shown_in_tables_and_a_picture(on_more_gpus: Path) -> None:
    scaling.main([str(on_more_gpus)])
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (on_more_gpus / "scaling.md").read_text().splitlines()
        if line.startswith("| tiny")
    ]
    full, exploit, smaller, staying, *lines = cells
    assert full[2:4] + full[5:] == ["full", "100 / 125 / 160", "- / - / -", "80% / 62%", "83% / 67%", "75% / 47%"]
    assert exploit[2:4] + exploit[5:] == [
        "exploit",
        "50 / - / 40",
        "+25% / - / -20%",
        "- / 125%",
        "- / 117%",
        "- / 75%",
    ]
    assert smaller[2:4] + smaller[5:] == ["exploit 20%", "40 / - / 32", "- / - / -", "- / 125%", "- / 115%", "- / -"]
    assert staying[2:4] + staying[5:7] == ["exploit, no offload", "40 / - / 50", "- / - / -", "- / 80%"]
    behind = {(row[2], row[3], row[-2]): row[-1] for row in lines}
    assert [row[8] for row in lines if row[2] == "exploit"] == ["+25%", "-20%", "-", "-"]
    assert behind["full", "4", "62.5%"] == "-"
    assert behind["exploit", "4", "125.0%"] == "+62.5"
    assert behind["exploit", "4", "75.0%"] == "+28.1"
    assert (on_more_gpus / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_of_the_scaling_table_is_one() -> None:
    configurations = expand(yaml.safe_load((REPOSITORY / "tools" / "bench_scaling.yaml").read_text()))
    assert len(configurations) == 3 * 3 * (3 * 3 + 2 * 2)
    assert {one.ranks * one.micro_batch for one in configurations if one.micro_batch != 8} == {32}


def test_what_a_method_is_follows_from_its_entry() -> None:
    """Only launch/train.py builds an engine of its own, and it takes a policy; so do all that move states."""
    assert [name for name, method in METHODS.items() if method.start is None] == ["trainer"]
    everything = ["agsel-full", "agsel-lora-256", "agsel-lora-256-folded", "agsel-lora-64"]
    freezing = ["freezeout-lora-256-folded", "freezeout-lora-128-folded"]
    over_adapters = [*freezing, "exploit-lora-256", "exploit-lora-256-folded", "exploit-lora-16", "ist-lora-256"]
    over_elements = ["elements", "exploit-elements"]
    exploring = ["explore", "explore-early", "topk"]
    moving = [
        "fixed",
        "exploit",
        *exploring,
        "lisa",
        "agsel-badam",
        *everything,
        *over_adapters,
        *over_elements,
        "trainer",
    ]
    assert [name for name, method in METHODS.items() if method.moves_states] == moving
    reading = {name for name, method in METHODS.items() if method.reads_fraction}
    assert reading == {"bound", *moving, "badam"} - {"agsel-badam", *everything, "elements"}
    assert [name for name, method in METHODS.items() if method.reads_density] == [
        *over_elements,
        "supertuning",
        "shira",
    ]
    for name, method in METHODS.items():
        if method.moves_states:
            assert (f"lora-{method.lora_rank}" in name, name.endswith("-folded")) == ("lora" in name, method.folds)
    kinds = {name: method.kinds_of_steps for name, method in METHODS.items() if method.kinds_of_steps}
    exploiting = dict.fromkeys((name for name in moving if name not in exploring), ("exploit",))
    asking = {"ist-lora-256": ("exploit", "losses")}
    assert kinds == {"full": ("full",), **dict.fromkeys(exploring, ("explore",)), **exploiting, **asking}
