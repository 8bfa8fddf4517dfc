"""The settings of a run: defaults, then the YAML file of `--config`, then the command line. The later one wins."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args, get_type_hints

import yaml
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from agsel import shipped
from agsel.errors import UserError, complaints_of_libraries, suggestion
from agsel.policies import Policy
from agsel.training.arguments import DataArguments, SafetyArguments, SelectionArguments
from agsel.training.methods import build_policy, method_arguments, policy_class, unread
from agsel.training.model import agree_on_settings

GROUPS = (ScriptArguments, SFTConfig, ModelConfig, SelectionArguments, DataArguments, SafetyArguments)
USAGE = "deepspeed [--num_gpus N] launch/train.py [--config RECIPE] [--SETTING VALUE ...]"
DESCRIPTION = """A setting stands here, or in the YAML file by its name without the dashes; here it wins. The last four
groups are agsel's own, the settings above them those of TRL's ScriptArguments, SFTConfig and ModelConfig."""
NOT_WRITTEN = ("hub_token", "local_rank")
REFUSED_ZERO_SETTINGS = ("offload_optimizer", "offload_param", "zenflow", "elastic_checkpoint")
"""What `agsel.attach` would refuse; DeepSpeed stumbles over some of it earlier, in many lines."""


@dataclass(frozen=True)
class Configuration:
    """All settings of a run, by who reads them.

    Attributes:
        resolved: all of them by name as plain YAML values, the content of the DeepSpeed file among them.
        ignored: what the file of `--config` sets and the method does not read.
    """

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    selection: SelectionArguments
    data: DataArguments
    safety: SafetyArguments
    resolved: dict[str, Any]
    ignored: dict[str, Any]

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage of the DeepSpeed configuration."""
        return self.training.hf_deepspeed_config.config["zero_optimization"]["stage"]

    @property
    def taking_part(self) -> Literal["layers", "all"]:
        """`select_blocks`, or what the method takes where it is left open."""
        chosen = self.selection.select_blocks or policy_class(self.selection.method).takes_part
        return cast(Literal["layers", "all"], chosen)

    def build_policy(self) -> Policy:
        """The policy that the settings describe."""
        return build_policy(self.selection.method, self.resolved)


def parse_configuration(arguments: Sequence[str], defaults: dict[str, Any]) -> Configuration:
    """Read the command line and the YAML file it names. Starts `torch.distributed`, as `TrainingArguments` does.

    Args:
        arguments: the command line, without the program's name.
        defaults: settings whose default differs from TRL's.

    Raises:
        UserError: an unknown or impossible setting; the message names it.
    """
    words = _with_config_apart(arguments)
    in_file = _read_file(words)
    policy = policy_class(_method_of(words, in_file))
    parser = _parser_for(policy)
    parser.set_defaults(**defaults)
    _refuse_unread(policy, _names_of(words))
    with complaints_of_libraries():
        script, training, model, selection, _, data, safety, *unknown = parser.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
    parser.refuse_unknown(unknown[0], "in the file of --config")
    parser.refuse_unknown(unknown[1], "on the command line")
    ignored = {name: in_file[name] for name in unread(policy, in_file) if in_file[name] != parser.before_file[name]}
    configuration = Configuration(script, training, model, selection, data, safety, parser.resolved, ignored)
    _complete(configuration)
    configuration.build_policy()  # refuses bad values now, not after minutes of loading
    return configuration


def _parser_for(policy: type[Policy]) -> "_Parser":
    taken = {name for group in GROUPS for name in group.__dataclass_fields__}
    try:
        groups = (*GROUPS[:4], method_arguments(policy, taken), *GROUPS[4:])
        return _Parser(groups, usage=USAGE, description=DESCRIPTION, allow_abbrev=False)
    except (TypeError, ValueError) as error:  # the field of a policy from elsewhere has a type that is no setting
        raise UserError(f"a field of {policy.__name__} (--method) cannot be a setting: {error}") from error


def _method_of(words: Sequence[str], in_file: Mapping[str, Any]) -> str:
    """The method of the run, which decides what settings there are."""
    method = in_file.get("method", SelectionArguments.method)
    for word, following in zip_longest(words, words[1:]):
        if word == "--method" or word.startswith("--method="):
            method = word.partition("=")[2] or following
    return str(method)


def _names_of(words: Sequence[str]) -> list[str]:
    """Of the settings on a command line; argparse also takes dashes for underscores."""
    return [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]


def _refuse_unread(policy: type[Policy], names: Sequence[str]) -> None:
    for name in unread(policy, names):
        raise UserError(
            f"{policy.method or policy.__name__} does not read --{name}: leave it out, or choose a method that does "
            "(--method; --help says which)"
        )


def write_configuration(configuration: Configuration) -> Path:
    """Write the resolved settings to `<output_dir>/config.yaml`, which `--config` reads again."""
    path = Path(configuration.training.output_dir, "config.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "# every setting of this run; use it again with --config\n" + yaml.safe_dump(configuration.resolved)
    )
    return path


def _with_config_apart(arguments: Sequence[str]) -> list[str]:
    """`--config=FILE` in two words, which `TrlParser` looks for; and the file in place of a recipe's name."""
    words = [word for argument in arguments for word in _words(argument)]
    if "--config" in words:
        place = words.index("--config") + 1
        name = next(iter(words[place:]), "")
        if not name or name.startswith("--"):
            raise UserError("no file after --config: name a YAML file or a recipe")
        path = Path(name) if Path(name).is_file() else shipped.recipe(name)
        if path is None:
            raise UserError(
                f"no such file: {name} (--config); recipes by name are {', '.join(shipped.names('recipes'))}"
            )
        words[place] = str(path)
    return words


def _words(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _read_file(words: Sequence[str]) -> dict[str, Any]:
    """The settings in the file of `--config`, none without one."""
    if "--config" not in words:
        return {}
    path = words[words.index("--config") + 1]
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise UserError(f"the file of --config is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} has no settings (--config): write one `name: value` a line, as the recipes do")
    return settings


class _Parser(TrlParser):
    """`TrlParser` whose complaints are `UserError`s, and which keeps what it parsed.

    Attributes:
        before_file: the settings' defaults without the file of `--config`.
        resolved: the settings as they were parsed, and the content of the DeepSpeed file.
    """

    before_file: dict[str, Any]
    resolved: dict[str, Any]

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, remaining = super().parse_known_args(args, namespace)
        self.resolved = {
            name: value.value if isinstance(value, Enum) else value
            for name, value in vars(parsed).items()
            if name not in NOT_WRITTEN
        }
        _require_possible(self.resolved)
        parsed.deepspeed = self.resolved["deepspeed"] = _read_deepspeed(parsed.deepspeed)
        _require_zero(parsed.deepspeed)
        return parsed, remaining

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        self.before_file = {name: self.get_default(name) for name in settings}
        for name in sorted(self._never_none() & settings.keys()):
            if settings[name] is None and self.get_default(name) is not None:
                raise UserError(f"{name} has no value in the file of --config: give it one, or leave the line out")
        return super().set_defaults_with_config(**settings)

    def _never_none(self) -> set[str]:
        """Names of the settings that cannot be None."""
        types = {name: hint for group in self.dataclass_types for name, hint in get_type_hints(group).items()}
        return {name for name, hint in types.items() if type(None) not in get_args(hint)}

    def refuse_unknown(self, names: Iterable[str], where: str) -> None:
        name = next((name for name in names if name.startswith("--")), next(iter(names), None))
        if name is not None:
            name = name.removeprefix("--").split("=")[0]
            raise UserError(f"unknown setting {name!r} {where}{suggestion(name, self.resolved)}")


def _require_possible(settings: dict[str, Any]) -> None:
    """What TRL would accept, or refuse late or in many lines."""
    if not settings["output_dir"]:
        raise UserError("no run folder: name it (--output_dir)")
    if not settings["model_name_or_path"]:
        raise UserError("no model: name a folder or a hub model (--model_name_or_path)")
    if settings["dataset_streaming"]:
        raise UserError("agsel checks every row before it trains: streaming is not supported (--dataset_streaming)")
    if settings["save_only_model"]:
        raise UserError(
            "--save_only_model would make checkpoints that cannot be resumed: leave it out, the trained model is "
            "written to model/ anyway"
        )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if settings[name] < 1:
            raise UserError(f"{name} must be 1 or more, got {settings[name]} (--{name})")


def _require_zero(settings: dict[str, Any]) -> None:
    """The DeepSpeed configuration has a stage that agsel can train and export."""
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError("zero_optimization is no JSON object (--deepspeed): use zero1, zero2 or zero3")
    if zero.get("stage") not in (1, 2, 3):
        raise UserError("zero_optimization.stage is not 1, 2 or 3 (--deepspeed): use zero1, zero2 or zero3")
    for name in REFUSED_ZERO_SETTINGS:
        value = zero.get(name)
        if value and (not isinstance(value, dict) or value.get("device") != "none"):
            raise UserError(
                f"zero_optimization.{name} is not supported (--deepspeed): remove it, agsel keeps the optimizer states "
                "of blocks that are not selected in host memory itself (--offload_states)"
            )
    if zero["stage"] == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            "ZeRO-3 cannot export the model: set stage3_gather_16bit_weights_on_model_save to true (--deepspeed)"
        )


def _read_deepspeed(deepspeed: Any) -> dict[str, Any]:
    """The DeepSpeed settings: of a file, of a shipped one by its name, as JSON, or as they stand in a YAML file."""
    settings = deepspeed
    if isinstance(deepspeed, str):
        text = deepspeed if deepspeed.startswith("{") else _deepspeed_file(deepspeed).read_text()
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise UserError(f"{deepspeed} is no JSON (--deepspeed): {error}") from error
    if not isinstance(settings, dict):
        raise UserError("the DeepSpeed settings are no JSON object (--deepspeed): zero1, zero2 and zero3 are examples")
    return settings


def _deepspeed_file(name: str) -> Path:
    path = Path(name) if Path(name).is_file() else shipped.zero_configuration(name)
    if path is None:
        raise UserError(
            f"no such file: {name} (--deepspeed); shipped by name are {', '.join(shipped.names('ds_configs'))}"
        )
    return path


def _complete(configuration: Configuration) -> None:
    """Derive what the user left open, and check what depends on several groups."""
    training, model = configuration.training, configuration.model
    agree_on_settings(model, training)
    engine_dtype = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    model.dtype = model.dtype or engine_dtype
    if engine_dtype == "float32" and model.dtype != "float32":
        raise UserError(f"--dtype {model.dtype} cannot train in fp32: leave it out, or set --bf16 or --fp16")
    if configuration.selection.compile_layers:
        _prepare_compilation(configuration)
    missing = sorted(set(training.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise UserError(f"{missing[0]} is not installed: install it, or leave it out (--report_to)")
    mismatches = [line.removeprefix("- ") for line in training.hf_deepspeed_config.mismatches]
    if mismatches:
        raise UserError(
            f"the DeepSpeed configuration (--deepspeed) contradicts other settings ({', '.join(mismatches)}): "
            'write "auto" for these values'
        )
    if training.ddp_timeout < configuration.safety.rank_timeout:
        raise UserError(
            f"--ddp_timeout {training.ddp_timeout} is less than --rank_timeout {configuration.safety.rank_timeout:g}: "
            "ranks would stop waiting for a silent one before it can be named"
        )
    training.resume_from_checkpoint = _wanted_checkpoint(training.resume_from_checkpoint)


def _prepare_compilation(configuration: Configuration) -> None:
    if configuration.zero_stage == 3:
        raise UserError(
            "--compile_layers does not work at ZeRO-3, which gathers the weights inside the layers: use stage 1 or 2 "
            "(--deepspeed), or leave it out"
        )
    if configuration.training.use_liger_kernel:
        raise UserError(
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
        raise UserError(f"no such checkpoint folder: {wanted} (--resume_from_checkpoint)")
    return str(wanted)
