"""Settings: the YAML file, the command line over it, what is refused, and the file that a run leaves behind."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from agsel.train import default_settings
from agsel.training.configuration import Configuration, configure, write_configuration
from agsel.training.settings import GROUPS, read_settings
from agsel.training.usage import MOST_USED, WORDS
from tests.distributed import REPOSITORY

RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))
DEFAULTS = {"deepspeed": "zero2", "use_cpu": True, "dtype": None}


pytestmark = pytest.mark.usefixtures("untouched_environment")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    settings = {
        "model_name_or_path": "some/model",
        "output_dir": str(tmp_path / "run"),
        "bf16": False,
        "learning_rate": "3e-4",
        "select_fraction": 0.5,
        "gradient_checkpointing_kwargs": {"every_n_layers": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def parse(*arguments: object) -> Configuration:
    return configure(read_settings([str(argument) for argument in arguments], DEFAULTS))


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(recipe: Path) -> None:
    from_file = parse("--config", recipe)
    assert from_file.resolved["select_fraction"] == 0.5
    assert from_file.training.learning_rate == 3e-4, "YAML reads 3e-4 as text"
    assert from_file.resolved["epsilon_start"] == 1.0
    assert parse("--config", recipe, "--select_fraction", 0.25).resolved["select_fraction"] == 0.25


def test_the_model_has_the_type_that_is_trained(recipe: Path) -> None:
    assert parse("--config", recipe).model.dtype == "float32"
    assert parse("--config", recipe, "--bf16", "true").model.dtype == "bfloat16"


def test_the_methods_own_default_of_the_blocks_that_take_part() -> None:
    always = ["--model_name_or_path", "some/model", "--output_dir", "run", "--bf16", "false"]
    assert parse(*always).taking_part == "layers"
    assert parse(*always, "--method", "full").taking_part == "all"
    assert parse(*always, "--method", "full", "--select_blocks", "layers").taking_part == "layers"
    assert parse(*always, "--method", "full", "--select_from", "0.5").taking_part == "layers"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--elements", "lottery"], "there is no method 'lottery': use gallop, gem, saft (--elements)"),
        (["--elements", "gem", "--element_density", "0"], "above 0 and at most 1, got 0 (--element_density)"),
        (["--elements", "gem", "--element_density", "1.5"], "at most 1, got 1.5 (--element_density)"),
        (["--elements", "gem", "--element_density", "nan"], "at most 1, got nan (--element_density)"),
        (["--elements", "saft", "--element_samples", "0"], "1 or more, got 0 (--element_samples)"),
        (["--elements", "saft", "--use_peft"], "leave out --use_peft, or --elements"),
        (["--elements", "saft", "--load_in_4bit"], "leave out --load_in_4bit, or --elements"),
    ],
)
def test_wrong_settings_of_elements_are_refused(recipe: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse("--config", recipe, *words)


def test_what_the_method_does_not_read_is_refused_on_the_command_line(recipe: Path) -> None:
    for words in (["--epsilon_start", "0.5"], ["--epsilon-start=0.5"], ["--selection_seed", "3"]):
        with pytest.raises(ValueError, match=r"full does not read --(epsilon_start|selection_seed): leave it out"):
            parse("--config", recipe, "--method", "full", *words)
    with pytest.raises(ValueError, match="adagradselect does not read --select_every"):
        parse("--config", recipe, "--select_every", "5")


def test_what_the_method_does_not_read_is_ignored_in_the_file(recipe: Path) -> None:
    settings = yaml.safe_load(recipe.read_text()) | {"method": "topk", "epsilon_start": 0.5, "select_every": 1}
    recipe.write_text(yaml.safe_dump(settings))
    assert parse("--config", recipe).ignored == {"epsilon_start": 0.5}, "nothing is lost of what is the default anyway"
    assert parse("--config", recipe, "--method", "adagradselect").ignored == {}
    assert parse("--config", recipe, "--method", "full").ignored == {"select_fraction": 0.5, "epsilon_start": 0.5}
    path = write_configuration(parse("--config", recipe, "--method", "adagradselect"))
    assert parse("--config", path, "--method", "topk").ignored == {"epsilon_start": 0.5}


def test_a_policy_from_elsewhere_brings_its_settings(recipe: Path) -> None:
    method = "tests.test_training_arguments:Strided"
    configuration = parse("--config", recipe, "--method", method, "--stride", 4, "--seed", 11)
    policy: Any = configuration.build_policy()
    assert (policy.stride, policy.seed) == (4, 11)
    assert configuration.ignored == {"select_fraction": 0.5}
    path = write_configuration(configuration)
    again: Any = parse("--config", path).build_policy()
    assert again == policy
    with pytest.raises(ValueError, match="unknown setting 'stride' on the command line"):
        parse("--config", recipe, "--stride", 4)


def test_the_content_of_the_deepspeed_file_is_part_of_the_settings(recipe: Path, tmp_path: Path) -> None:
    zero = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    zero["zero_optimization"]["reduce_bucket_size"] = 1234
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    first = parse("--config", recipe, "--deepspeed", tmp_path / "zero.json")
    assert first.resolved["deepspeed"] == zero
    path = write_configuration(first)
    (tmp_path / "zero.json").unlink()
    again = parse("--config", path)
    assert again.zero_stage == 3
    assert again.training.hf_deepspeed_config.config["zero_optimization"]["reduce_bucket_size"] == 1234
    assert again.resolved == first.resolved


def test_what_is_shipped_can_be_named(recipe: Path) -> None:
    assert parse("--config", recipe, "--deepspeed", "zero1").zero_stage == 1
    assert parse("--config", "demo", "--bf16", "false").resolved["select_fraction"] == 0.5
    with pytest.raises(ValueError, match=r"no such file: zero4 \(--deepspeed\); shipped by name are zero1, "):
        parse("--config", recipe, "--deepspeed", "zero4")
    with pytest.raises(ValueError, match=r"no such file: dmo \(--config\); recipes by name are demo, "):
        parse("--config", "dmo")


def test_the_run_folder_keeps_every_setting_and_config_reads_it_again(recipe: Path) -> None:
    first = parse("--config", recipe, "--method", "topk", "--rank_timeout", 30, "--hub_token", "secret")
    first.training.gradient_checkpointing_kwargs["use_reentrant"] = True  # as TRL does
    path = write_configuration(first)
    assert path == Path(first.training.output_dir, "config.yaml")
    assert "secret" not in path.read_text()
    again = parse("--config", path)
    assert again.resolved == first.resolved
    assert again.selection == first.selection
    assert again.safety == first.safety
    assert parse("--config", path, "--method", "full").taking_part == "all", "what was left open still is"
    assert again.training.gradient_checkpointing_kwargs == {"every_n_layers": 2}


FOLDED = ["--fold_adapters", "true", "--use_peft", "true"]
EARLY = ("--choose_early", "true", "--gradient_accumulation_steps", "2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--select_fractoin", "0.3"], "unknown setting 'select_fractoin' on the command line.*'select_fraction'"),
        (["--select_frac", "0.3"], "unknown setting 'select_frac' on the command line"),
        (["--select_fraction", "a third"], "--select_fraction.*a third"),
        (["--method", "best"], "'best'.*--method"),
        (["--output_dir", ""], "--output_dir"),
        (["--model_name_or_path", ""], "--model_name_or_path"),
        (["--deepspeed", "zero9.json"], "no such file: zero9.json.*--deepspeed"),
        (["--deepspeed", "{]"], "no JSON.*--deepspeed"),
        (["--deepspeed", '{"zero_optimization": {"stage": 0}}'], "not 1, 2 or 3.*--deepspeed"),
        (["--deepspeed", "{}"], "not 1, 2 or 3.*--deepspeed"),
        (["--dtype", "bfloat16"], "--dtype bfloat16.*--bf16"),
        (["--dataset_streaming", "true"], "--dataset_streaming"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere.*--resume_from_checkpoint"),
        (["--rank_timeout", "1"], "--rank_timeout"),
        (["--rank_timeout", "300.5", "--ddp_timeout", "300"], "--ddp_timeout 300 is less than --rank_timeout 300.5"),
        (["--fp16", "true", "--bf16", "true"], "fp16 and bf16"),
        (["--per_device_train_batch_size", "0"], "must be 1 or more, got 0.*--per_device_train_batch_size"),
        (["--gradient_accumulation_steps", "0"], "must be 1 or more, got 0.*--gradient_accumulation_steps"),
        (["--select_from", "-1"], "--select_from"),
        (["--select_from", "1.5"], "--select_from"),
        (["--select_from", "2", "--select_blocks", "all"], "--select_from.*--select_blocks layers"),
        (["--select_from", "2", "--method", "lisa"], "--select_from.*--select_blocks layers"),
        (["--merge_adapter", "true"], "--use_peft"),
        (["--fold_adapters", "true"], "--use_peft"),
        ([*FOLDED, "--lora_dropout", "0.1"], "--lora_dropout is 0.1: set it to 0"),
        ([*FOLDED, "--lora_dropout", "0", "--use_dora", "true"], "leave out --use_dora, or --fold_adapters"),
        (["--choose_early", "true"], "raise --gradient_accumulation_steps, or leave it out"),
        ([*EARLY, "--method", "random"], "--choose_early has no effect with --method random"),
        ([*EARLY, "--explore_steps", "0"], "--choose_early has no effect with --method adagradselect"),
        (["--optim", "sgd"], "agsel trains with AdamW, not with sgd .--optim.: use adamw_torch or adamw_torch_fused"),
        (["--method", "ist"], "--use_peft"),
        (["--method", "ist", "--use_peft", "true", "--compile_layers", "true"], "leave out --compile_layers"),
        (["--method", "ist", "--use_peft", "true", "--label_smoothing_factor", "0.1"], "--label_smoothing_factor"),
        (["--report_to", "wandb"], "wandb is not installed.*--report_to"),
    ],
)
def test_impossible_settings_are_refused_by_name(recipe: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse("--config", recipe, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--deepspeed", "LIST"], r"no JSON object \(--deepspeed\)"),
        (["--deepspeed", '{"zero_optimization": true}'], r"zero_optimization is no JSON object \(--deepspeed\)"),
        (["--deepspeed", '{"zero_optimization": null}'], r"zero_optimization is no JSON object \(--deepspeed\)"),
        (["--save_only_model", "true"], "--save_only_model.*cannot be resumed: leave it out"),
    ],
)
def test_what_would_end_in_a_traceback_or_a_useless_checkpoint_is_refused(
    recipe: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=words):
        parse("--config", recipe, *(word.replace("LIST", str(tmp_path / "list.json")) for word in arguments))


def test_a_deepspeed_configuration_that_contradicts_the_settings_is_refused(recipe: Path) -> None:
    zero = json.loads((REPOSITORY / "ds_configs" / "zero2.json").read_text()) | {"train_micro_batch_size_per_gpu": 3}
    with pytest.raises(ValueError, match=r"train_micro_batch_size_per_gpu=3 vs .*per_device_train_batch_size=.*auto"):
        parse("--config", recipe, "--deepspeed", json.dumps(zero))


def test_adapters_have_no_dropout_unless_it_is_asked_for(recipe: Path) -> None:
    def dropout(*given: object) -> float:
        return configure(
            read_settings([*map(str, ("--config", recipe, *given))], default_settings())
        ).model.lora_dropout

    assert dropout(*FOLDED) == 0
    assert dropout("--use_peft", "true", "--lora_dropout", 0.1) == 0.1


def test_config_may_be_given_in_one_word(recipe: Path) -> None:
    assert parse(f"--config={recipe}", "--method", "topk").resolved["select_fraction"] == 0.5


@pytest.mark.parametrize("arguments", [["--config"], ["--config="], ["--config", "--method", "topk"]])
def test_config_without_a_file_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="no file after --config"):
        parse(*arguments)


@pytest.mark.parametrize("name", ["select_fraction", "rank_timeout", "learning_rate", "explore_steps"])
def test_null_in_the_file_is_refused_unless_it_means_something(recipe: Path, name: str) -> None:
    settings = yaml.safe_load(recipe.read_text()) | {name: None}
    recipe.write_text(yaml.safe_dump(settings))
    if name == "explore_steps":
        assert parse("--config", recipe).resolved["explore_steps"] is None
        return
    with pytest.raises(ValueError, match=f"{name} has no value in the file of --config"):
        parse("--config", recipe)


def test_an_unknown_key_of_the_file_is_refused_by_name(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "selectfraction: 0.3\n")
    with pytest.raises(ValueError, match=r"unknown setting 'selectfraction' in the file.*'select_fraction'"):
        parse("--config", recipe)


def test_a_file_that_is_missing_or_no_yaml_is_refused(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file: nothing\.yaml \(--config\)"):
        parse("--config", "nothing.yaml")
    recipe.write_text("a: [1\nb: 2")
    with pytest.raises(ValueError, match="--config is no YAML"):
        parse("--config", recipe)


def test_zero_3_without_gathering_cannot_export(recipe: Path, tmp_path: Path) -> None:
    settings = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save"):
        parse("--config", recipe, "--deepspeed", tmp_path / "zero3.json")


def test_layers_are_compiled_at_stage_1_or_2_and_without_liger(recipe: Path) -> None:
    assert parse("--config", recipe, "--compile_layers", "true").selection.compile_layers
    with pytest.raises(ValueError, match=r"--use_liger_kernel or --compile_layers"):
        parse("--config", recipe, "--use_liger_kernel", "true", "--compile_layers", "true")
    zero3 = REPOSITORY / "ds_configs" / "zero3.json"
    with pytest.raises(ValueError, match=r"--compile_layers.*--deepspeed"):
        parse("--config", recipe, "--deepspeed", zero3, "--compile_layers", "true")


def help_text(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse("--help", *words)
    assert ended.value.code is None
    return capsys.readouterr().out


def titles(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]


def test_help_begins_with_how_to_start_and_the_settings_of_agsel(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys)
    assert text.startswith("usage: deepspeed [--num_gpus N] launch/train.py [--config RECIPE]")
    assert titles(text)[:8] == [
        "block selection:",
        "settings of the methods:",
        "single weights:",
        "columns of the dataset:",
        "datasets:",
        "tasks judged at every evaluation:",
        "output:",
        "safety:",
    ]
    assert "--help all" in text.splitlines()[-1]
    assert "norms and biases included" in " ".join(text.split()), "transformers' words are not true here"


def test_help_offers_nothing_that_is_refused(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    text = help_text(capsys)
    for name in ("dataset_streaming", "save_only_model", "enable_jit_checkpoint", "optim", "fsdp", "torch_compile"):
        assert f"--{name} " not in text
    for name in ("dataset_streaming", "save_only_model", "enable_jit_checkpoint"):
        with pytest.raises(ValueError, match=f"--{name}"):
            parse("--config", recipe, f"--{name}", "true")


def test_help_all_shows_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "all")
    assert titles(text)[-3:] == ["ScriptArguments of TRL:", "SFTConfig of TRL:", "ModelConfig of TRL:"]
    names = {field.name for group in GROUPS for field in fields(group) if field.init}
    assert [name for name in sorted(names) if f"\n  --{name} " not in text] == []
    assert "Automatically excluded from bias" not in text
    assert names > {*WORDS, *chain(*MOST_USED.values())}


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 6


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    configuration = parse("--config", path, "--bf16", "false")
    assert configuration.fields.prompt_field or configuration.fields.prompt_template
    assert f"launch/train.py --config launch/recipes/{path.name}" in path.read_text()
    assert configuration.ignored == {}
