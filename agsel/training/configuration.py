"""The settings of a run: defaults, then the YAML file of `--config`, then the command line. The later one wins."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from agsel.training.arguments import DataArguments, SafetyArguments, SelectionArguments, suggestion

GROUPS = (ScriptArguments, SFTConfig, ModelConfig, SelectionArguments, DataArguments, SafetyArguments)
USAGE = "deepspeed [--num_gpus N] launch/train.py [--config FILE.yaml] [--SETTING VALUE ...]"
DESCRIPTION = """A setting stands here, or in the YAML file by its name without the dashes; here it wins. The last three
groups are agsel's own, the settings above them those of TRL's ScriptArguments, SFTConfig and ModelConfig."""
NOT_WRITTEN = ("hub_token", "local_rank")
REFUSED_ZERO_SETTINGS = ("offload_optimizer", "offload_param", "zenflow", "elastic_checkpoint")
"""What `agsel.attach` would refuse; DeepSpeed stumbles over some of it earlier, in many lines."""


@dataclass(frozen=True)
class Configuration:
    """All settings of a run, by who reads them; `resolved` is all of them by name, as plain YAML values."""

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    selection: SelectionArguments
    data: DataArguments
    safety: SafetyArguments
    resolved: dict[str, Any]

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage of the DeepSpeed configuration."""
        return self.training.hf_deepspeed_config.config["zero_optimization"]["stage"]


def parse_configuration(arguments: Sequence[str], defaults: dict[str, Any]) -> Configuration:
    """Read the command line and the YAML file it names. Starts `torch.distributed`, as `TrainingArguments` does.

    Args:
        arguments: the command line, without the program's name.
        defaults: settings whose default differs from TRL's.

    Raises:
        ValueError: an unknown or impossible setting; the message names it.
    """
    parser = _Parser(GROUPS, usage=USAGE, description=DESCRIPTION, allow_abbrev=False)
    parser.set_defaults(**defaults)
    try:
        script, training, model, selection, data, safety, *unknown = parser.parse_args_and_config(
            _with_config_apart(arguments), return_remaining_strings=True, separate_remaining_strings=True
        )
    except yaml.YAMLError as error:
        raise ValueError(f"the file of --config is no YAML: {error}") from error
    parser.refuse_unknown(unknown[0], "in the file of --config")
    parser.refuse_unknown(unknown[1], "on the command line")
    configuration = Configuration(script, training, model, selection, data, safety, parser.resolved)
    _complete(configuration)
    return configuration


def write_configuration(configuration: Configuration) -> Path:
    """Write the resolved settings to `<output_dir>/config.yaml`, which `--config` reads again."""
    path = Path(configuration.training.output_dir, "config.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "# every setting of this run; use it again with --config\n" + yaml.safe_dump(configuration.resolved)
    )
    return path


def _with_config_apart(arguments: Sequence[str]) -> list[str]:
    """`--config=FILE` in two words: `TrlParser` looks for the word `--config` only."""
    words = [word for argument in arguments for word in _words(argument)]
    if "--config" in words:
        file = words[words.index("--config") + 1 :][:1]
        if not file or not file[0] or file[0].startswith("--"):
            raise ValueError("no file after --config: name a YAML file")
        if not Path(file[0]).is_file():
            raise ValueError(f"no such file: {file[0]} (--config); launch/recipes/ has some")
    return words


def _words(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


class _Parser(TrlParser):
    """`TrlParser` whose complaints are one-line `ValueError`s, and which keeps what it parsed."""

    resolved: dict[str, Any]

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, remaining = super().parse_known_args(args, namespace)
        self.resolved = {
            name: value.value if isinstance(value, Enum) else value
            for name, value in vars(parsed).items()
            if name not in NOT_WRITTEN
        }
        _require_possible(self.resolved)
        return parsed, remaining

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        for name in sorted(_never_none() & settings.keys()):
            if settings[name] is None and self.get_default(name) is not None:
                raise ValueError(f"{name} has no value in the file of --config: give it one, or leave the line out")
        return super().set_defaults_with_config(**settings)

    def refuse_unknown(self, names: Iterable[str], where: str) -> None:
        name = next((name for name in names if name.startswith("--")), next(iter(names), None))
        if name is not None:
            name = name.removeprefix("--").split("=")[0]
            raise ValueError(f"unknown setting {name!r} {where}{suggestion(name, self.resolved)}")


def _never_none() -> set[str]:
    """Names of the settings that cannot be None."""
    types = {name: hint for group in GROUPS for name, hint in get_type_hints(group).items()}
    return {name for name, hint in types.items() if type(None) not in get_args(hint)}


def _require_possible(settings: dict[str, Any]) -> None:
    """What TRL would accept, or refuse late or in many lines."""
    if not settings["output_dir"]:
        raise ValueError("no run folder: name it (--output_dir)")
    if not settings["model_name_or_path"]:
        raise ValueError("no model: name a folder or a hub model (--model_name_or_path)")
    if settings["dataset_streaming"]:
        raise ValueError("agsel checks every row before it trains: streaming is not supported (--dataset_streaming)")
    if settings["save_only_model"]:
        raise ValueError(
            "--save_only_model would make checkpoints that cannot be resumed: leave it out, the trained model is "
            "written to model/ anyway"
        )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if settings[name] < 1:
            raise ValueError(f"{name} must be 1 or more, got {settings[name]} (--{name})")
    _require_zero(settings["deepspeed"])


def _require_zero(deepspeed: Any) -> None:
    """The DeepSpeed configuration (a file or the settings themselves) has a stage that agsel can train and export."""
    settings = (_read_deepspeed(deepspeed) if isinstance(deepspeed, str) else deepspeed) or {}
    if not isinstance(settings, dict):
        raise ValueError("the DeepSpeed settings are no JSON object (--deepspeed): ds_configs/ has examples")
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError("zero_optimization is no JSON object (--deepspeed): ds_configs/ has one for each stage")
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError("zero_optimization.stage is not 1, 2 or 3 (--deepspeed): ds_configs/ has one of each")
    for name in REFUSED_ZERO_SETTINGS:
        value = zero.get(name)
        if value and (not isinstance(value, dict) or value.get("device") != "none"):
            raise ValueError(
                f"zero_optimization.{name} is not supported (--deepspeed): remove it, agsel keeps the optimizer states "
                "of blocks that are not selected in host memory itself (--offload_states)"
            )
    if zero["stage"] == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "ZeRO-3 cannot export the model: set stage3_gather_16bit_weights_on_model_save to true (--deepspeed)"
        )


def _read_deepspeed(deepspeed: str) -> Any:
    inline = deepspeed.startswith("{")
    if not inline and not Path(deepspeed).is_file():
        raise ValueError(f"no such file: {deepspeed} (--deepspeed)")
    try:
        return json.loads(deepspeed if inline else Path(deepspeed).read_text())
    except ValueError as error:
        raise ValueError(f"{deepspeed} is no JSON (--deepspeed): {error}") from error


def _complete(configuration: Configuration) -> None:
    """Derive what the user left open, and check what depends on several groups."""
    training, model = configuration.training, configuration.model
    engine_dtype = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    model.dtype = model.dtype or engine_dtype
    if engine_dtype == "float32" and model.dtype != "float32":
        raise ValueError(f"--dtype {model.dtype} cannot train in fp32: leave it out, or set --bf16 or --fp16")
    if configuration.selection.compile_layers:
        _prepare_compilation(configuration)
    missing = sorted(set(training.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise ValueError(f"{missing[0]} is not installed: install it, or leave it out (--report_to)")
    mismatches = [line.removeprefix("- ") for line in training.hf_deepspeed_config.mismatches]
    if mismatches:
        raise ValueError(
            f"the DeepSpeed configuration (--deepspeed) contradicts other settings ({', '.join(mismatches)}): "
            'write "auto" for these values'
        )
    if training.ddp_timeout < configuration.safety.rank_timeout:
        raise ValueError(
            f"--ddp_timeout {training.ddp_timeout} is less than --rank_timeout {configuration.safety.rank_timeout:g}: "
            "ranks would stop waiting for a silent one before it can be named"
        )
    training.resume_from_checkpoint = _wanted_checkpoint(training.resume_from_checkpoint)


def _prepare_compilation(configuration: Configuration) -> None:
    if configuration.zero_stage == 3:
        raise ValueError(
            "--compile_layers does not work at ZeRO-3, which gathers the weights inside the layers: use stage 1 or 2 "
            "(--deepspeed), or leave it out"
        )
    if configuration.training.use_liger_kernel:
        raise ValueError(
            "torch.compile cannot trace Liger's kernels: leave out --use_liger_kernel or --compile_layers (TRL's own "
            "chunked loss, which saves the memory of the logits, works with both)"
        )


def _wanted_checkpoint(wanted: str | None) -> str | None:
    """A folder, `auto`, `true`, or none; `agsel.runs.resume.find_checkpoint` says what they mean."""
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() in ("auto", "true"):
        return str(wanted).lower()
    if not os.path.isdir(wanted):
        raise ValueError(f"no such checkpoint folder: {wanted} (--resume_from_checkpoint)")
    return str(wanted)
