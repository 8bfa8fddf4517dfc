"""Settings that YAML or DeepSpeed reads otherwise than they are meant, and mistakes that would end late."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from agsel.errors import UserError
from agsel.training.configuration import Configuration, configure
from agsel.training.deepspeed_settings import read_deepspeed, require_deepspeed
from agsel.training.settings import Settings, read_settings
from tests.distributed import REPOSITORY

DEFAULTS = {"deepspeed": "zero2", "use_cpu": True, "dtype": None}
Read = Callable[..., Settings]


pytestmark = pytest.mark.usefixtures("untouched_environment")


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Settings of a file with these lines, and of a command line."""

    def of(text: str, *words: object) -> Settings:
        path = tmp_path / "settings.yaml"
        given = {"model_name_or_path": "some/model", "output_dir": str(tmp_path / "run"), "bf16": False}
        kept = {name: value for name, value in given.items() if f"{name}:" not in text}
        path.write_text(yaml.safe_dump(kept) + text)
        return read_settings(["--config", str(path), *map(str, words)], DEFAULTS)

    return of


def refuse(run: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as refusal:
        run()
    for part in words:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("max_steps: 2.0", "max_steps", 2),
        ("max_steps: '2'", "max_steps", 2),
        ("num_train_epochs: 2", "num_train_epochs", 2),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("eval_strategy: off", "eval_strategy", "no"),
        ("save_strategy: no", "save_strategy", "no"),
        ("logging_strategy: 'no'", "logging_strategy", "no"),
        ("packing: on", "packing", True),
        ("lora_target_modules: q_proj\nuse_peft: true", "lora_target_modules", ["q_proj"]),
        ("lora_target_modules: [q_proj, v_proj]\nuse_peft: true", "lora_target_modules", ["q_proj", "v_proj"]),
        ("report_to: none", "report_to", "none"),
        ("datasets: {path: a.jsonl}", "datasets", [{"path": "a.jsonl"}]),
        (
            "datasets: [{path: a, columns: [b]}]",
            "datasets",
            [{"path": "a", "columns": ["b"]}],
        ),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "true"),
        ("output_dir: '2024'", "output_dir", "2024"),
        ("explore_steps: null", "explore_steps", None),
        (r"prompt_template: 'a\n{b}'", "prompt_template", r"a\n{b}"),
        (r'prompt_template: "a\n{b}"', "prompt_template", "a\n{b}"),
        ("lr_scheduler_kwargs: {num_decay_steps: 2}", "lr_scheduler_kwargs", {"num_decay_steps": 2}),
        ("trackio_static_space_id: some/space", "trackio_static_space_id", "some/space"),
    ],
)
def test_a_value_in_a_file_is_what_is_meant(read: Read, text: str, name: str, expected: Any) -> None:
    settings = read(text)
    assert (settings.values[name], type(settings.values[name])) == (expected, type(expected))
    assert getattr(settings.parsed, name) == expected


WRONG_VALUES: dict[str, tuple[str, str]] = {
    "half a step": ("max_steps: 2.5", "max_steps is 2.5 in the file of --config: it must be a whole number"),
    "truth for a number": ("max_steps: yes", "max_steps is true in the file of --config: it takes no truth value"),
    "word for a number": ("max_steps: five", "argument --max_steps/--max-steps: invalid int value: 'five'"),
    "number for a word": (
        "eval_strategy: 5",
        "eval_strategy is 5 in the file of --config: it must be one of epoch",
    ),
    "truth for a word": (
        "eval_strategy: yes",
        "eval_strategy is true in the file of --config: it must be one of epoch",
    ),
    "unknown word": (
        "lr_scheduler_type: cosin",
        'lr_scheduler_type is "cosin" in the file of --config: it must be',
    ),
    "several values": ("max_steps: [1, 2]", "max_steps is [1, 2] in the file of --config: it takes one value"),
    "mapping": ("output_dir: {a: b}", 'output_dir is {"a": "b"} in the file of --config: it takes one value'),
    "number for text": ("output_dir: 2024", "output_dir is 2024 in the file of --config: it is text, put it in quotes"),
    "date for text": (
        "run_name: 2024-01-02",
        'run_name is "2024-01-02" in the file of --config: it is text, put',
    ),
    "nothing": ("max_steps:", "max_steps has no value in the file of --config: give it one, or leave the line out"),
    "truth for a name": ("on: true", "unknown setting 'true' in the file of --config"),
    "number for a name": ("5: true", "unknown setting '5' in the file of --config"),
    "environment": ("env: [A]", "env in the file of --config is no mapping: write `NAME: value` a line below it"),
    "streaming": ("streaming: true", "streaming in the file of --config is not supported: agsel checks every row"),
    "test split": (
        "test_split_size: 0.1",
        "test_split_size in the file of --config is not supported: write eval_",
    ),
    "twice": ("max_steps: 5\nseed: 1\nmax_steps: 6", "max_steps stands in line 4 and again in line 6: leave one out"),
    "tab": ("max_steps:\t- 5", "the file of --config is no YAML: "),
    "kwargs": ("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs is [1] in the file of --config: it takes one value"),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_in_a_file_is_refused_by_name(read: Read, name: str) -> None:
    text, words = WRONG_VALUES[name]
    refuse(lambda: read(text), words)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"- a\n", b"", b"just words"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    refuse(lambda: read_settings(["--config", str(path)], DEFAULTS), "--config")


def test_a_file_of_another_system_is_read(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("\ufeffmodel_name_or_path: m\r\noutput_dir: ü\r\nbf16: no\r\n", encoding="utf-8", newline="")
    settings = read_settings(["--config", str(path)], DEFAULTS)
    assert (settings.values["output_dir"], settings.values["bf16"]) == ("ü", False)


def test_the_file_of_a_run_resumes_that_run_alone(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read("resume_from_checkpoint: auto")
    run, elsewhere = tmp_path / "runs" / "mine", tmp_path / "elsewhere"
    (run / "checkpoint-4").mkdir(parents=True)
    elsewhere.mkdir()
    text = "{model_name_or_path: m, bf16: false, output_dir: runs/mine, resume_from_checkpoint: auto}"
    (run / "config.yaml").write_text(text)
    words = ["--config", str(run / "config.yaml")]
    monkeypatch.chdir(elsewhere)
    refuse(lambda: read_settings(words, DEFAULTS), "its output_dir, runs/mine, is another", f"add --output_dir {run}")
    read_settings([*words, "--output_dir", str(run)], DEFAULTS)
    read_settings([*words, "--output_dir", "anew"], DEFAULTS)
    monkeypatch.chdir(tmp_path)
    read_settings(words, DEFAULTS)
    refuse(lambda: read_settings(["--config", str(run)], DEFAULTS), "is a folder (--config): name a file in it")


def test_variables_of_a_file_are_set(read: Read) -> None:
    read("env: {AGSEL_TEST_NUMBER: 5}")
    assert os.environ["AGSEL_TEST_NUMBER"] == "5"


def test_templates_on_the_command_line_have_line_breaks(read: Read) -> None:
    words = ("--prompt_template", r"Question: {question}\nAnswer:", r"--completion_template=\t{answer}")
    values = read("prompt_template: x", *words).values
    assert (values["prompt_template"], values["completion_template"]) == ("Question: {question}\nAnswer:", "\t{answer}")


@pytest.mark.parametrize("words", [["--datasets", '{"path": "a"}', '{"path": "b"}'], ["--datasets", "a b"]])
def test_datasets_may_stand_on_the_command_line(read: Read, words: list[str]) -> None:
    assert read("", *words).values["datasets"] == words[1:]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--max_steps", "-5"], "max_steps must be above 0, or -1 for whole epochs, got -5 (--max_steps)"),
        (["--max_steps", "0"], "no optimizer step: set --max_steps or --num_train_epochs above 0"),
        (["--num_train_epochs", "0"], "no optimizer step: set --max_steps"),
        (["--num_train_epochs", "-1"], "no optimizer step: set --max_steps"),
        (["--num_train_epochs", "nan"], "no optimizer step: set --max_steps"),
        (["--max_length", "0"], "max_length must be 1 or more, got 0 (--max_length)"),
        (["--max_length", "-5"], "max_length must be 1 or more, got -5 (--max_length)"),
        (["--dataset_num_proc", "0"], "dataset_num_proc must be 1 or more, got 0 (--dataset_num_proc)"),
        (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size must be 1 or more, got 0 (--per_dev"),
        (["--learning_rate", "-1"], "learning_rate must be 0 or more, got -1.0 (--learning_rate)"),
        (["--learning_rate", "nan"], "learning_rate must be 0 or more, got nan (--learning_rate)"),
        (["--warmup_steps", "-1"], "warmup_steps must be 0 or more, got -1"),
        (["--seed", "-1"], "seed must be 0 or more, got -1 (--seed)"),
        (["--streaming", "true"], "streaming on the command line is not supported: agsel checks every row"),
        (["--test_split_size=0.1"], "test_split_size on the command line is not supported: write eval_split_fraction"),
    ],
)
def test_a_run_that_could_not_train_is_refused(read: Read, words: list[str], expected: str) -> None:
    refuse(lambda: read("", *words), expected)


def test_steps_may_be_given_either_way(read: Read) -> None:
    assert read("num_train_epochs: 0", "--max_steps", 1).values["max_steps"] == 1
    assert read("max_length: null").values["max_length"] is None


def schedule(read: Read, kind: str, arguments: Any = None, **changed: object) -> Configuration:
    given = {"lr_scheduler_type": kind} | changed | ({} if arguments is None else {"lr_scheduler_kwargs": arguments})
    return configure(read(yaml.safe_dump(given)))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("polynomial", None),
        ("polynomial", {"power": 2.0}),
        ("warmup_stable_decay", {"num_decay_steps": 2}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("constant", {}),
    ],
)
def test_a_schedule_that_can_be_made_is_accepted(read: Read, kind: str, arguments: Any) -> None:
    assert schedule(read, kind, arguments).training.lr_scheduler_type.value == kind


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        ("warmup_stable_decay", None, "num_decay_steps"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("cosine_with_min_lr", None, "min_lr"),
        ("linear", {"power": 2.0}, "power"),
        ("polynomial", {"lr_end": 1.0}, "lr_end (1.0) must be smaller than initial lr"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused(read: Read, kind: str, arguments: Any, reason: str) -> None:
    written = json.dumps(arguments or {})
    words = f"cannot make the schedule --lr_scheduler_type {kind} with --lr_scheduler_kwargs {written}: "
    refuse(lambda: schedule(read, kind, arguments), words, reason)


def zero(stage: int = 2, **changed: Any) -> dict[str, Any]:
    """A shipped configuration, some of it changed; `section__name` is a setting of a section, None takes one out."""
    settings = json.loads((REPOSITORY / "ds_configs" / f"zero{stage}.json").read_text())
    for path, value in changed.items():
        *sections, name = path.split("__")
        section = settings
        for step in sections:
            section = section.setdefault(step, {})
        section[name] = value
        if value is None:
            del section[name]
    return settings


WRONG_DEEPSPEED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        zero(zero_optimization__reduce_buckets=1),
        "DeepSpeed does not take reduce_buckets (--deepspeed): Extra",
    ),
    "no batch size": (
        zero(train_micro_batch_size_per_gpu=None),
        'train_micro_batch_size_per_gpu is missing (--deepspeed): write "auto" for it, which is --per_device_train',
    ),
    "no batch sizes": (
        zero(train_micro_batch_size_per_gpu=None, train_batch_size=None, gradient_accumulation_steps=None),
        "train_micro_batch_size_per_gpu is missing (--deepspeed)",
    ),
    "no accumulation": (zero(gradient_accumulation_steps=None), "gradient_accumulation_steps is missing (--deepspeed)"),
    "auto bucket": (
        zero(zero_optimization__allgather_bucket_size="auto"),
        'zero_optimization.allgather_bucket_size is "auto" (--deepspeed), and nothing fills it in: give it a value',
    ),
    "auto elsewhere": (zero(fp16__hysteresis="auto"), 'fp16.hysteresis is "auto" (--deepspeed), and nothing fills it'),
    "word for a size": (zero(zero_optimization__reduce_bucket_size="large"), "does not take reduce_bucket_size"),
    "negative size": (zero(zero_optimization__reduce_bucket_size=-1), "does not take reduce_bucket_size"),
    "stage as text": (zero(zero_optimization__stage="2"), "zero_optimization.stage is not 1, 2 or 3 (--deepspeed)"),
    "no stage": (zero(zero_optimization__stage=None), "zero_optimization.stage is not 1, 2 or 3 (--deepspeed)"),
    "null stage": (zero() | {"zero_optimization": {"stage": None}}, "zero_optimization.stage is not 1, 2 or 3"),
    "no batch": (zero(train_micro_batch_size_per_gpu=0), "(--deepspeed)"),
    "null batch": (zero() | {"train_micro_batch_size_per_gpu": None}, "(--deepspeed)"),
    "text for fp16": (zero(fp16="yes"), "(--deepspeed)"),
    "optimizer": (zero() | {"optimizer": {"type": "AdamW"}}, "has an `optimizer` section: remove it"),
    "scheduler": (
        zero() | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}},
        "has a `scheduler` section, which would take the place of --lr_scheduler_type: remove it",
    ),
    "zenflow": (
        zero(zero_optimization__zenflow={"topk_ratio": 0.1}),
        "zero_optimization.zenflow is not supported",
    ),
}


@pytest.mark.parametrize("name", WRONG_DEEPSPEED)
def test_a_mistake_in_deepspeeds_configuration_is_refused(read: Read, name: str) -> None:
    settings, words = WRONG_DEEPSPEED[name]
    refuse(lambda: read("", "--deepspeed", json.dumps(settings)), words, "(--deepspeed)")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_shipped_is_accepted(stage: int) -> None:
    require_deepspeed(read_deepspeed(f"zero{stage}"))
    require_deepspeed(read_deepspeed(zero(stage, zero_optimization__round_robin_gradients=True)))
    require_deepspeed(read_deepspeed(zero(stage, fp16__enabled=True, train_micro_batch_size_per_gpu=4)))
    none = {"device": "none"}
    require_deepspeed(read_deepspeed(zero(stage, zero_optimization__offload_optimizer=none)))


def test_clipping_is_that_of_the_settings_unless_it_is_set() -> None:
    assert read_deepspeed(zero(gradient_clipping=None))["gradient_clipping"] == "auto"
    assert read_deepspeed(zero(gradient_clipping=0.5))["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "is no JSON (--deepspeed): "),
        (b"", "is no JSON (--deepspeed): "),
        (b"{'a': 1}", "is no JSON (--deepspeed): Expecting property name"),
        (b'"zero2"', "no JSON object (--deepspeed): zero1, zero2 and zero3 are examples"),
        (b"null", "no JSON object (--deepspeed)"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "zero.json"
    path.write_bytes(content)
    refuse(lambda: read_deepspeed(str(path)), words)
    refuse(lambda: read_deepspeed(str(tmp_path)), f"no such file: {tmp_path} (--deepspeed)")


def test_a_configuration_may_stand_in_the_file_of_settings(read: Read) -> None:
    assert read(yaml.safe_dump({"deepspeed": zero(3)})).values["deepspeed"] == zero(3)
    bom = "\ufeff" + json.dumps(zero(1))
    path = Path(read("").values["output_dir"]).with_name("zero.json")
    path.write_text(bom, encoding="utf-8")
    assert read(f"deepspeed: {path}").values["deepspeed"] == zero(1)
