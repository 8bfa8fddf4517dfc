"""`launch/train.py` as users start it: results, files, export, resumption, and what it says when something is wrong."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard._utils import figure_to_image
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig

from agsel.monitor import METRICS, SELECTION, STARTS, SelectionHistory, pictures
from agsel.monitor.history import read_lines
from agsel.training.chosen_elements import FILE
from agsel.training.curves import PICTURES
from tests.distributed import REPOSITORY, environment, free_port, launch, run_ranks
from tests.tiny import tiny_batch
from tests.tiny_run import TRAIN, save_model, save_rows, settings

REFUSED_ZERO_SETTINGS = {
    "offload_optimizer": {"device": "cpu", "super_offload": True},
    "offload_param": {"device": "cpu"},
    "zenflow": {"topk_ratio": 0.05},
    "elastic_checkpoint": True,
}
BAD_INPUT = (
    *REFUSED_ZERO_SETTINGS,
    *("fraction", "unknown", "model", "file", "empty", "field", "row", "masked", "messages", "split", "stage"),
    *("optimizer", "optim", "reentrant", "yaml", "output", "earlier run", "encoder", "bitsandbytes"),
    *("no template", "no prefix", "unread", "no module", "no policy", "earlier checkpoint"),
    *("own settings", "own result", "own elements", "own merged"),
)
LAYERS = [f"layers.{index}" for index in range(4)]
TEXTS = ("plan", "configuration", "environment")
HPARAMS_OF_EXPERIMENT = "_hparams_/experiment"


def alone(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a Python script without a launcher."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=environment() | (env or {}), cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )


def several_runs(folder: Path, cases: dict[str, list[str]]) -> dict[str, Any]:
    """Exit code, output and step reached of command lines, run one after the other in one process."""
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = alone(REPOSITORY / "tests" / "several_runs.py", folder / "cases.json")
    assert worker.returncode == 0, worker.stderr[-6000:]
    return json.loads(worker.stdout.partition("RESULT")[2])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def scalars(run: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def said(output: str) -> list[str]:
    return [line for line in output.splitlines() if "agsel: error:" in line]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a data file."""
    folder = tmp_path_factory.mktemp("parts")
    return save_model(folder / "model"), save_rows(folder / "rows.jsonl", 32)


def twelve_steps(parts: tuple[Path, Path], run: Path, **changed: object) -> list[str]:
    """Three epochs of four steps of eight examples; a large eps, so that Adam does not magnify rounding."""
    chosen = {"max_steps": 12, "learning_rate": 1e-3, "adam_epsilon": 1e-4, "logging_steps": 1} | changed
    return settings(*parts, run, **chosen)


@pytest.fixture(scope="module")
def two_ranks(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run folder and output of 2 examples x 2 accumulation x 2 ranks, with a checkpoint after six of twelve steps."""
    run = tmp_path_factory.mktemp("two_ranks")
    accumulated = twelve_steps(parts, run, gradient_accumulation_steps=2, save_strategy="steps", save_steps=6)
    result = launch(TRAIN, *accumulated, ranks=2)
    assert result.returncode == 0, result.stdout[-6000:]
    return run, result.stdout


def test_two_ranks_with_accumulation_equal_one_rank_with_the_whole_batch(
    parts: tuple[Path, Path], two_ranks: tuple[Path, str], tmp_path: Path
) -> None:
    """Rows have ragged lengths: a mean of means would differ. The single rank needs no launcher."""
    result = alone(TRAIN, *twelve_steps(parts, tmp_path, per_device_train_batch_size=8))
    assert result.returncode == 0, result.stderr[-6000:]
    one, two = scalars(tmp_path), scalars(two_ranks[0])
    assert one["train/loss"] == pytest.approx(two["train/loss"], abs=2e-6)
    counted = [SelectionHistory.read(folder / SELECTION).counts() for folder in (tmp_path, two_ranks[0])]
    assert counted[0] == counted[1]
    for name, weight in weights(tmp_path).items():
        torch.testing.assert_close(weight, weights(two_ranks[0])[name], rtol=0, atol=2e-6)


def test_the_arithmetic_is_printed_before_training(two_ranks: tuple[Path, str]) -> None:
    output = two_ranks[1]
    arithmetic, _, training = output.partition("step  1/12  epoch 0.25  loss ")
    assert "2 examples x 2 accumulation x 2 ranks = 8 examples" in arithmetic
    assert "4 per epoch of 32 sequences, 12 in all" in arithmetic
    assert "4: layers 0-3, 5,432 parameters each; 2 trained per step" in arithmetic
    assert "explore_steps 4," in arithmetic, "as long as epoch 1"
    assert "GB per host for optimizer states\n" in arithmetic, "on the CPU there is no GPU to plan for"
    assert re.search(
        r"step 12/12  epoch 3.00  loss \d.*  exploit ε 0.00  layers .*  0:00:\d\d, 0:00:00 left\n", training
    )
    assert re.search(r"trained   12 steps in 0:0\d:\d\d, loss [\d.]+ -> [\d.]+\n", training)


def test_tensorboard_shows_training_and_selection_in_one_file(two_ranks: tuple[Path, str]) -> None:
    run = two_ranks[0]
    assert len(list((run / "tensorboard").iterdir())) == 1
    logged = scalars(run)
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm", "selection/epsilon", "selection/entropy"):
        assert len(logged[tag]) == 12, tag
    assert logged["selection/blocks"] == [2] * 12
    assert logged["selection/explored"][0] == 1, "ε starts at 1"
    assert logged["selection/explored"][4:] == [0] * 8
    assert logged["selection/epsilon"][0] == 1, "that of the step itself"
    assert min(logged["selection/epsilon"][:4]) > 0
    assert logged["selection/epsilon"][4:] == [0] * 8, "exploring ends with the four steps of epoch 1"
    for tag in ("speed/ms_per_step", "speed/data_ms", "memory/host_gb", "memory/moved_gb_per_step"):
        assert len(logged[tag]) == 12, tag
        assert min(logged[tag]) >= 0
    assert len(logged["speed/tokens_per_second"]) == 11, "the first step tells no speed"
    assert not any(tag.startswith("block_count") for tag in logged)


def test_tensorboard_shows_pictures_settings_and_texts(two_ranks: tuple[Path, str]) -> None:
    events = EventAccumulator(str(two_ranks[0] / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == set(PICTURES)
    image = events.Images("selection/trained_blocks")[-1]
    assert (image.step, image.width > 400) == (12, True)
    shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    redrawn = figure_to_image(pictures.selection_map(SelectionHistory.read(two_ranks[0] / SELECTION)))
    assert np.array_equal(shown, redrawn.transpose(1, 2, 0)[..., :3])
    texts = {name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode() for name in TEXTS}
    assert "per epoch of 32 sequences" in texts["plan"]
    assert "learning_rate: 0.001" in texts["configuration"]
    assert version("torch") in texts["environment"]
    plugins = [
        events.SummaryMetadata(tag).plugin_data for tag in ("_hparams_/session_start_info", HPARAMS_OF_EXPERIMENT)
    ]
    assert {plugin.plugin_name for plugin in plugins} == {"hparams"}
    started = HParamsPluginData.FromString(plugins[0].content).session_start_info.hparams
    assert started["method"].string_value == "adagradselect"
    assert started["fraction"].number_value == 0.5
    assert started["explore_steps"].number_value == 4


def test_every_step_and_every_log_is_a_line_of_its_file(two_ranks: tuple[Path, str]) -> None:
    run = two_ranks[0]
    lines, logged = read_lines(run / METRICS), scalars(run)
    assert [line["step"] for line in lines] == [*range(1, 13)]
    assert [line["loss"] for line in lines] == pytest.approx(logged["train/loss"])
    assert [line["selection/epsilon"] for line in lines] == pytest.approx(logged["selection/epsilon"])
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    history = SelectionHistory.read(run / SELECTION)
    assert history.steps == [*range(1, 13)]
    assert history.modes[0] == "explore"
    assert history.modes[4:] == ["exploit"] * 8
    assert history.counts() == json.loads((run / "selection.json").read_text())["counts"]
    for layer, norms in zip(history.blocks, history.measured(), strict=True):
        measured = [norm for norm in norms.tolist() if norm == norm]
        assert measured == pytest.approx(logged[f"block_norm/{layer}"], rel=1e-3)


def test_the_model_has_a_card_and_the_run_folder_a_guide(two_ranks: tuple[Path, str]) -> None:
    run = two_ranks[0]
    card = ModelCard.load(run / "model" / "README.md")
    assert card.data.tags == ["agsel", "adagradselect", "sft"]
    assert card.data.base_model is None, "a folder here is nothing on the hub"
    assert "None" not in card.content
    assert "| explore_steps | 4 |" in card.text
    assert f"torch {version('torch')}" in card.text
    assert (run / "model" / "selection.png").read_bytes().startswith(b"\x89PNG")
    guide = (run / "README.md").read_text()
    for path in run.iterdir():
        named = re.sub(r"checkpoint-\d+", "checkpoint-*", path.name)
        assert f"`{named}`" in guide, "every file is explained"
    assert "finished, 12 steps" in (run / "report.html").read_text()
    assert [line["step"] for line in read_lines(run / STARTS)] == [0]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["ranks"] == 2
    assert environment["packages"]["deepspeed"] == version("deepspeed")


def test_the_run_folder_tells_which_blocks_were_trained(parts: tuple[Path, Path], two_ranks: tuple[Path, str]) -> None:
    run = two_ranks[0]
    report = json.loads((run / "selection.json").read_text())
    assert report["method"] == "AdaGradSelect"
    assert report["blocks"] == LAYERS
    assert report["steps"] == 12
    assert sum(report["counts"].values()) == 24
    before, after = load_file(parts[0] / "model.safetensors"), weights(run)
    changed = {".".join(name.split(".")[1:3]) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {layer for layer, count in report["counts"].items() if count}


@pytest.mark.slow  # tests/test_preemption.py resumes with it, in the same folder
def test_resuming_with_the_written_configuration_gives_the_same_model(
    two_ranks: tuple[Path, str], tmp_path: Path
) -> None:
    run = two_ranks[0]
    result = launch(
        TRAIN,
        "--config",
        run / "config.yaml",
        "--output_dir",
        tmp_path,
        "--resume_from_checkpoint",
        run / "checkpoint-6",
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert "step  6/12" not in result.stdout
    for name, weight in weights(tmp_path).items():
        assert torch.equal(weight, weights(run)[name]), name
    resumed, whole = ((folder / "selection.json").read_text() for folder in (tmp_path, run))
    assert resumed == whole


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_resuming_on_another_number_of_ranks_goes_on_as_before(
    parts: tuple[Path, Path], two_ranks: tuple[Path, str], tmp_path: Path, ranks: int
) -> None:
    """The same eight examples per step on one rank and on four. A setting of exploring changes nothing after it."""
    run = two_ranks[0]
    changes = {"per_device_train_batch_size": 4 // ranks, "gradient_accumulation_steps": 2, "epsilon_start": 0.9}
    arguments = twelve_steps(parts, tmp_path, **changes, resume_from_checkpoint=run / "checkpoint-6")
    result = launch(TRAIN, *arguments, ranks=ranks)
    assert result.returncode == 0, result.stdout[-6000:]
    assert f"changed   ranks was 2 and is {ranks} now" in result.stdout
    assert result.stdout.count("the selection continues with changed settings: epsilon_start 1.0 -> 0.9") == 1
    resumed, whole = scalars(tmp_path), scalars(run)
    assert resumed["train/loss"] == pytest.approx(whole["train/loss"][6:], abs=1e-6)
    assert resumed["train/learning_rate"] == whole["train/learning_rate"][6:]
    reports = [json.loads((folder / "selection.json").read_text()) for folder in (tmp_path, run)]
    assert reports[0] == reports[1] | {"epsilon_start": 0.9}
    for name, weight in weights(tmp_path).items():
        torch.testing.assert_close(weight, weights(run)[name], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_elements_go_on_on_another_number_of_ranks(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """With the mask of the run folder, and where it is chosen again."""
    elements = {"elements": "gallop", "element_density": 0.1, "element_samples": 16, "gradient_accumulation_steps": 2}
    runs = {name: tmp_path / name for name in ("two", "kept", "chosen")}
    result = launch(TRAIN, *twelve_steps(parts, runs["two"], **elements, save_strategy="steps", save_steps=6), ranks=2)
    assert result.returncode == 0, result.stdout[-6000:]
    runs["kept"].mkdir()
    shutil.copy(runs["two"] / FILE, runs["kept"])
    for name in ("kept", "chosen"):
        changes = {"per_device_train_batch_size": 1, "resume_from_checkpoint": runs["two"] / "checkpoint-6"}
        result = launch(TRAIN, *twelve_steps(parts, runs[name], **elements | changes), ranks=4)
        assert result.returncode == 0, result.stdout[-6000:]
        assert "changed   ranks was 2 and is 4 now" in result.stdout
        assert ("elements  as chosen before" in result.stdout) == (name == "kept")
        assert scalars(runs[name])["train/loss"] == pytest.approx(scalars(runs["two"])["train/loss"][6:], abs=1e-6)
        for weight, expected in weights(runs["two"]).items():
            torch.testing.assert_close(weights(runs[name])[weight], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_the_exported_model_reloads_to_equal_logits(stage: int, tmp_path: Path) -> None:
    """Tied and untied; at stage 2 in bf16; at stage 3 with every weight partitioned."""
    for name in ("tied", "untied"):
        save_model(tmp_path / name, tied=name == "tied")
    save_rows(tmp_path / "rows.jsonl", 16)
    zero = json.loads((REPOSITORY / "ds_configs" / f"zero{stage}.json").read_text())
    if stage == 3:
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    choices = {"deepspeed": tmp_path / "zero.json", "bf16": stage == 2, "select_blocks": "all", "method": "random"}
    arguments = [text for name, value in choices.items() for text in (f"--{name}", str(value).lower())]
    run_ranks(REPOSITORY / "tests" / "export_worker.py", tmp_path, *arguments)
    for name in ("tied", "untied"):
        folder = tmp_path / f"run-{name}" / "model"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")
        with safe_open(tmp_path / f"run-{name}" / "model" / "model.safetensors", "pt") as weights:
            assert ("lm_head.weight" in weights.keys()) == (name == "untied")  # noqa: SIM118
        assert model.dtype == (torch.bfloat16 if stage == 2 else torch.float32)
        with torch.no_grad():
            logits = model(tiny_batch(0, 0, 0)).logits
            untrained = AutoModelForCausalLM.from_pretrained(tmp_path / name)(tiny_batch(0, 0, 0)).logits
        torch.testing.assert_close(logits, torch.load(tmp_path / f"run-{name}" / "logits.pt"), rtol=0, atol=0)
        assert not torch.allclose(logits.float(), untrained.float(), atol=1e-2), "the run has trained something"
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"


def test_an_error_is_written_in_one_piece() -> None:
    """Ranks share a terminal, and the launchers start them unbuffered: what comes in pieces gets mixed up."""
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # one datagram is one write
    with reader, writer:
        code = f"import os; from agsel.runs.ranks import say_error; os.dup2({writer.fileno()}, 2); say_error('why')"
        command = [sys.executable, "-u", "-c", code]
        subprocess.run(command, cwd=REPOSITORY, env=environment(), pass_fds=[writer.fileno()], check=True, timeout=200)
        assert reader.recv(4096) == b"agsel: error: why\n"


def earlier_run(folder: Path) -> Path:
    (folder / "earlier run" / "model").mkdir(parents=True)
    return folder / "earlier run"


def of_the_user(folder: Path, name: str) -> Path:
    (folder / f"with {name}").mkdir()
    (folder / f"with {name}" / name).write_text("# mine\n")
    return folder / f"with {name}"


def earlier_checkpoint(folder: Path) -> Path:
    (folder / "earlier checkpoint" / "checkpoint-654").mkdir(parents=True)
    (folder / "earlier checkpoint" / "config.yaml").write_text("of the earlier run\n")
    return folder / "earlier checkpoint"


def encoder(folder: Path) -> Path:
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(folder)
    return folder


def with_chat_template(folder: Path, template: str | None) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def bad_input(parts: tuple[Path, Path], tmp_path: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """What is changed in the settings of a run, and words of the line that refuses it."""
    empty = save_rows(tmp_path / "empty.jsonl", 0)
    bad_row = save_rows(tmp_path / "bad_row.jsonl", 9, row_5={"answer": ""})
    talk = [{"role": "user", "content": "w3 w4 w5"}, {"role": "assistant", "content": "w3"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    messages = {"dataset_name": tmp_path / "talk.jsonl", "max_length": 4}
    messages |= dict.fromkeys(("prompt_field", "completion_field", "completion_template"))
    (tmp_path / "stage0.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto"}))
    zero = json.loads((REPOSITORY / "ds_configs" / "zero2.json").read_text())
    (tmp_path / "optimizer.json").write_text(json.dumps(zero | {"optimizer": {"type": "AdamW"}}))
    for name, value in REFUSED_ZERO_SETTINGS.items():
        refused = zero | {"zero_optimization": zero["zero_optimization"] | {name: value}}
        (tmp_path / f"{name}.json").write_text(json.dumps(refused))
    expected = {
        name: ({"deepspeed": tmp_path / f"{name}.json"}, f"zero_optimization.{name} is not supported (--deepspeed)")
        for name in REFUSED_ZERO_SETTINGS
    }
    expected |= {
        "fraction": ({"select_fraction": 1.5}, "--select_fraction"),
        "unknown": ({"select_fractions": 0.5}, "did you mean 'select_fraction'"),
        "model": ({"model_name_or_path": tmp_path / "nowhere"}, "--model_name_or_path"),
        "file": ({"dataset_name": tmp_path / "nowhere.jsonl"}, "--dataset_name"),
        "empty": ({"dataset_name": empty}, "is empty (--dataset_name)"),
        "field": ({"completion_field": "anwser", "completion_template": None}, "did you mean 'answer'"),
        "row": ({"dataset_name": bad_row}, "row 5 of the dataset has nothing to learn"),
        "masked": ({"max_length": 3}, "has no label left, as its prompt alone fills --max_length 3"),
        "messages": (messages, "row 0 of the dataset has no label left"),  # the loss is on the assistant's words only
        "split": ({"eval_strategy": "steps"}, "--dataset_test_split"),
        "stage": ({"deepspeed": tmp_path / "stage0.json"}, "stage is not 1, 2 or 3 (--deepspeed)"),
        "optimizer": ({"deepspeed": tmp_path / "optimizer.json"}, "has an `optimizer` section: remove it"),
        "optim": ({"optim": "sgd"}, "(--optim)"),
        "reentrant": ({"gradient_checkpointing_kwargs": '{"use_reentrant": true}'}, "--gradient_checkpointing_kwargs"),
        "yaml": ({"config": tmp_path / "nowhere.yaml"}, "nowhere.yaml (--config)"),
        "output": ({"output_dir": empty / "run"}, "cannot make the run folder (--output_dir)"),
        "earlier run": ({"output_dir": earlier_run(tmp_path)}, "(--output_dir) holds model/ of an earlier run"),
        "own settings": ({"output_dir": of_the_user(tmp_path, "config.yaml")}, "holds config.yaml, which is of no run"),
        "own result": ({"output_dir": of_the_user(tmp_path, "result.json")}, "holds result.json, which is of no run"),
        "own elements": (
            {"output_dir": of_the_user(tmp_path, "elements.safetensors"), "elements": "gallop"},
            "holds elements.safetensors, which is of no run",
        ),
        "own merged": (
            {"output_dir": of_the_user(tmp_path, "merged"), "use_peft": True, "merge_adapter": True},
            "holds merged/, which is of no run",
        ),
        "earlier checkpoint": ({"output_dir": earlier_checkpoint(tmp_path)}, "checkpoint-654 of an earlier run"),
        "encoder": ({"model_name_or_path": encoder(tmp_path / "encoder")}, "is a BertForMaskedLM, which generates no"),
        "bitsandbytes": ({"load_in_4bit": True, "use_peft": True}, "bitsandbytes"),
        "unread": ({"epsilon_start": 0.5, "method": "topk"}, "topk does not read --epsilon_start: leave it out"),
        "no module": ({"method": "no_such_module:Rule"}, "no module 'no_such_module' (--method no_such_module:Rule)"),
        "no policy": ({"method": "tests.round_robin:dataclass"}, "is no subclass of agsel.Policy"),
    }
    for name, (template, words) in {
        "no template": (None, "has no chat template: name one (--chat_template_path)"),
        "no prefix": (
            "w{{ messages | length }} {% for message in messages %}{{ message.content }} {% endfor %}",
            "the chat template does not tell what the assistant says in message 1",
        ),
    }.items():
        model = with_chat_template(save_model(tmp_path / f"{name} model"), template)
        expected[name] = (messages | {"model_name_or_path": model, "max_length": 64}, words)
    return expected


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all that is refused."""
    return tmp_path_factory.mktemp("refused")


@pytest.fixture(scope="module")
def refused(parts: tuple[Path, Path], refusals: Path) -> dict[str, tuple[str, Any]]:
    """For each case the words, and the outcome. One process for all of them."""
    expected = bad_input(parts, refusals)
    cases = {name: settings(*parts, refusals / name, **changed) for name, (changed, _) in expected.items()}
    outcomes = several_runs(refusals, cases)
    return {name: (words, outcomes[name]) for name, (_, words) in expected.items()}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_in_one_line_that_names_setting_and_remedy(
    refused: dict[str, tuple[str, Any]], name: str
) -> None:
    words, (code, output, _) = refused[name]
    assert code == 2
    assert [words in line for line in said(output)] == [True], output
    assert "Traceback" not in output


def test_all_bad_input_is_tried(refused: dict[str, Any]) -> None:
    assert set(refused) == set(BAD_INPUT)


@pytest.mark.usefixtures("refused")
def test_what_is_of_no_run_is_not_overwritten(refusals: Path) -> None:
    for name in ("config.yaml", "result.json", "elements.safetensors", "merged"):
        assert (refusals / f"with {name}" / name).read_text() == "# mine\n"


@pytest.mark.usefixtures("refused")
def test_a_new_run_does_not_take_over_the_folder_of_another(refusals: Path) -> None:
    folder = refusals / "earlier checkpoint"
    assert (folder / "config.yaml").read_text() == "of the earlier run\n"
    assert {path.name for path in folder.iterdir() if path.name != "logs"} == {"checkpoint-654", "config.yaml"}


@pytest.mark.slow  # tests/test_run_faults.py proves it of a damaged checkpoint
def test_all_ranks_end_with_one_message(parts: tuple[Path, Path], tmp_path: Path) -> None:
    result = launch(TRAIN, *settings(*parts, tmp_path, max_length=3), timeout=120)
    assert result.returncode != 0
    assert len(said(result.stdout)) == 1, result.stdout[-4000:]
    assert "Traceback" not in result.stdout
    assert "stopped   " not in result.stdout, "the launcher ends the other rank, nobody else has asked for a stop"


def test_ranks_with_different_settings_end_with_one_message(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """As when two terminals, or two lines of a job script, are not the same."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TRAIN), *settings(*parts, tmp_path, seed=seed, select_fraction=fraction)],
            env=environment() | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (seed, fraction) in enumerate([(1, 0.5), (2, 0.25)])
    ]
    errors = "".join(rank.communicate(timeout=120)[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert len(said(errors)) == 1
    assert "seed is 1 and 2" in errors
    assert "select_fraction is 0.5 and 0.25" in errors
    assert "Traceback" not in errors
