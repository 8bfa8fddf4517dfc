"""Settings as they are given: defaults, then the YAML file of `--config`, then the command line; the later one wins.

All of it is plain values, read and checked before anything is started.
"""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from enum import Enum
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from trl import SFTConfig, TrlParser

from agsel import shipped
from agsel.data.fields import with_line_breaks
from agsel.errors import ParserComplaints, UserError, complaints_of_libraries, require_known
from agsel.place import is_first_of_host
from agsel.policies import Policy
from agsel.runs.checkpoints import checkpoints_in
from agsel.runs.folder import SETTINGS
from agsel.runs.resume import NEWEST
from agsel.training.arguments import SelectionArguments
from agsel.training.deepspeed_settings import read_deepspeed, require_deepspeed
from agsel.training.methods import build_policy, method_arguments, policy_class, unread
from agsel.training.unheeded import require_heeded
from agsel.training.usage import OWN, UPSTREAM, describe
from agsel.written_yaml import read_yaml

Group = TypeVar("Group")

GROUPS = (*UPSTREAM, *OWN)
AT_LEAST_1 = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "dataset_num_proc",
    "lora_r",
    "lora_alpha",
)
AT_LEAST_0 = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "neftune_noise_alpha",
    "dataloader_num_workers",
    "warmup_steps",
    "seed",
)
SHARES = ("label_smoothing_factor", "lora_dropout")
OBJECTS = ("gradient_checkpointing_kwargs", "lr_scheduler_kwargs", "model_init_kwargs")
"""On the command line they are JSON; what is none would be taken for text."""
LARGEST_SEED = 2**32 - 1
NOT_WRITTEN = ("hub_token", "local_rank")
OF_TRL_ALONE = {
    "streaming": "agsel checks every row before it trains: leave it out",
    "test_split_size": "write eval_split_fraction in its place",
}
"""What may stand beside `datasets` in a file for TRL, and the remedy."""


@dataclass(frozen=True)
class Settings:
    """All settings of a run.

    Attributes:
        values: by name, as plain YAML values, the content of the DeepSpeed file among them.
        ignored: what the file of `--config` sets and the method does not read.
        parsed: the same as `values`, as the parser has them.
    """

    values: dict[str, Any]
    ignored: dict[str, Any]
    parsed: Namespace

    def group(self, kind: type[Group]) -> Group:
        """Those of a group.

        Raises:
            UserError: a setting is out of its range.
        """
        names = [field.name for field in fields(kind) if field.init]  # type: ignore[arg-type]
        with complaints_of_libraries():
            return kind(**{name: deepcopy(getattr(self.parsed, name)) for name in names})


def read_settings(arguments: Sequence[str], defaults: Mapping[str, Any]) -> Settings:
    """Read the command line and the YAML file it names. Starts nothing.

    Args:
        arguments: the command line, without the program's name.
        defaults: settings whose default differs from TRL's.

    Raises:
        UserError: an unknown or impossible setting; the message names it.
        SystemExit: with `--help`, which has been printed.
    """
    words, path = _without_config(arguments)
    in_file = _read_file(path) if path else {}
    _set_environment(in_file.pop("env", {}))
    policy = policy_class(_method_of(words, in_file))
    if {"--help", "-h"} & {*words}:
        _print_help(policy, defaults, everything=("--help", "all") in pairwise(words))
    parser = _parser_for(policy)
    parser.set_defaults(**defaults)
    _refuse_unread(policy, _names_of(words))
    before_file = {name: parser.get_default(name) for name in in_file}
    unknown = parser.set_defaults_with_config(**_as_declared(in_file, parser.dataclass_types, before_file))
    parsed, unknown_words = parser.parse_known_args(words)
    require_known(unknown, vars(parsed), "in the file of --config", OF_TRL_ALONE)
    require_known(unknown_words, vars(parsed), "on the command line", OF_TRL_ALONE)
    values = _plain(parsed)
    _require_possible(values)
    if path is not None and "output_dir" not in _names_of(words):
        _require_folder_of_run(path, values)
    _require_device(values["use_cpu"], defaults)
    require_heeded(values, defaults, _names_of(words), in_file)
    values["deepspeed"] = parsed.deepspeed = read_deepspeed(parsed.deepspeed)
    require_deepspeed(values["deepspeed"])
    ignored = {name: in_file[name] for name in unread(policy, in_file) if in_file[name] != before_file[name]}
    settings = Settings(values, ignored, parsed)
    for group in GROUPS:
        if group is not SFTConfig:  # which starts torch.distributed
            settings.group(group)
    build_policy(values["method"], values)  # refuses bad values now, not after minutes of loading
    return settings


def _print_help(policy: type[Policy], defaults: Mapping[str, Any], *, everything: bool) -> NoReturn:
    """From one process of a host."""
    if is_first_of_host():
        sys.stdout.write(describe(policy, defaults, everything=everything))
    sys.exit()


def _plain(parsed: Namespace) -> dict[str, Any]:
    return {name: _without_enums(value) for name, value in vars(parsed).items() if name not in NOT_WRITTEN}


def _without_enums(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_enums(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _parser_for(policy: type[Policy]) -> _Parser:
    taken = {name for group in GROUPS for name in group.__dataclass_fields__}
    try:
        groups = (*GROUPS[:4], method_arguments(policy, taken), *GROUPS[4:])
        return _Parser(groups, add_help=False, allow_abbrev=False)
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


def _without_config(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The command line without `--config`, and the file that it names: a path, or a recipe."""
    words: list[str] = []
    path: Path | None = None
    rest = iter(arguments)
    for word in rest:
        if word == "--config" or word.startswith("--config="):
            path = _file_of(word.partition("=")[2] or next(rest, ""))
        else:
            words.append(word)
    return with_line_breaks(words), path


def _file_of(name: str) -> Path:
    if not name or name.startswith("--"):
        raise UserError("no file after --config: name a YAML file or a recipe")
    path = Path(name) if Path(name).is_file() else shipped.recipe(name)
    if path is None and Path(name).is_dir():
        raise UserError(f"{name} is a folder (--config): name a file in it, of a run its {SETTINGS}")
    if path is None:
        raise UserError(f"no such file: {name} (--config); recipes by name are {', '.join(shipped.names('recipes'))}")
    return path


def _read_file(path: Path) -> dict[str, Any]:
    """The settings in the file of `--config`."""
    try:
        settings = read_yaml(path)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"the file of --config is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} has no settings (--config): write one `name: value` a line, as the recipes do")
    wrong = next((name for name in settings if not isinstance(name, str)), None)
    if wrong is not None:
        raise UserError(f"unknown setting {str(wrong).lower()!r} in the file of --config")
    return settings


def _set_environment(variables: Any) -> None:
    if not isinstance(variables, dict):
        raise UserError("env in the file of --config is no mapping: write `NAME: value` a line below it")
    os.environ.update({name: str(value) for name, value in variables.items()})


def _as_declared(in_file: Mapping[str, Any], groups: Iterable[type], before: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a file, where YAML has read them otherwise than they are meant: `no`, `2.0`.

    Raises:
        UserError: a value is of a kind that the setting cannot have.
    """
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    return {
        name: _of_kind(name, value, hints[name], before[name]) if name in hints else value
        for name, value in in_file.items()
    }


def _kinds(hint: Any) -> tuple[set[type], set[Any]]:
    """(types that a value may have, its names if only some are allowed)"""
    kinds = {hint} if isinstance(hint, type) or get_origin(hint) is list else {*get_args(hint)}
    literals = {name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind) if name is not False}
    if get_origin(hint) is Literal:
        kinds, literals = {str}, {*get_args(hint)}
    types = {get_origin(kind) or kind for kind in kinds} - {Literal}
    members = {member.value for kind in types if issubclass(kind, Enum) for member in kind}
    return types | ({str} if literals else set()), literals | members


def _of_kind(name: str, value: Any, hint: Any, default: Any) -> Any:
    kinds, names = _kinds(hint)
    if value is None:
        if type(None) not in kinds and default is not None:
            raise UserError(f"{name} has no value in the file of --config: give it one, or leave the line out")
        return value
    if value is False and "no" in names:
        return "no"
    if list in kinds and type(value) not in kinds:
        return [value]
    if isinstance(value, bool) and kinds <= {str, type(None)}:
        return str(value).lower()
    needed = _what_it_must_be(value, kinds, names)
    if needed is not None:
        raise UserError(f"{name} is {json.dumps(value, default=str)} in the file of --config: it {needed}")
    return int(value) if isinstance(value, float) and int in kinds and float not in kinds else value


def _what_it_must_be(value: Any, kinds: set[type], names: set[str]) -> str | None:
    """What a value of a setting should have been, None if it may be what it is."""
    if names and not isinstance(value, tuple(kinds - {str})) and value not in names:
        return f"must be one of {', '.join(sorted(names))}"
    if isinstance(value, list | dict) and type(value) not in kinds:
        return "takes one value"
    if isinstance(value, bool) and bool not in kinds and str not in kinds:
        return "takes no truth value"
    if isinstance(value, float) and int in kinds and float not in kinds and not value.is_integer():
        return "must be a whole number"
    if kinds <= {str, type(None)} and not isinstance(value, str):
        return "is text, put it in quotes"
    return None


class _Parser(ParserComplaints, TrlParser):
    """Of settings."""


def _require_possible(settings: dict[str, Any]) -> None:
    """What TRL would accept, or refuse late or in many lines."""
    if not settings["output_dir"]:
        raise UserError("no run folder: name it (--output_dir)")
    if not settings["model_name_or_path"]:
        raise UserError("no model: name a folder or a hub model (--model_name_or_path)")
    if settings["dataset_streaming"]:
        raise UserError("agsel checks every row before it trains: streaming is not supported (--dataset_streaming)")
    _require_in_range(settings)
    for name in OBJECTS:
        _require_object(name, settings[name])
    if settings["max_steps"] < -1:
        raise UserError(f"max_steps must be above 0, or -1 for whole epochs, got {settings['max_steps']} (--max_steps)")
    if settings["max_steps"] == 0 or (settings["max_steps"] < 0 and not settings["num_train_epochs"] > 0):
        raise UserError("no optimizer step: set --max_steps or --num_train_epochs above 0")


def _require_folder_of_run(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse to begin anew where the file of a run, read from elsewhere, means another folder than its own."""
    own, named = path.resolve().parent, Path(values["output_dir"])
    resumes = path.name == SETTINGS and values["resume_from_checkpoint"] in NEWEST and named.resolve() != own
    if resumes and checkpoints_in(own) and not checkpoints_in(named):
        raise UserError(
            f"the checkpoints are beside {path} (--config), but its output_dir, {named}, is another folder from here: "
            f"add --output_dir {path.parent}"
        )


def _require_in_range(settings: dict[str, Any]) -> None:
    for name in AT_LEAST_1:
        if settings[name] is not None and settings[name] < 1:
            raise UserError(f"{name} must be 1 or more, got {settings[name]} (--{name})")
    for name in AT_LEAST_0:
        if settings[name] is not None and not 0 <= settings[name] < math.inf:
            raise UserError(f"{name} must be 0 or more, got {settings[name]} (--{name})")
    for name in SHARES:
        if not 0 <= settings[name] < 1:
            raise UserError(f"{name} must be 0 or more and below 1, got {settings[name]} (--{name})")
    if settings["seed"] > LARGEST_SEED:
        raise UserError(f"seed must be {LARGEST_SEED} or less, got {settings['seed']} (--seed)")
    for kind in ("logging", "save", "eval"):
        steps = settings[f"{kind}_steps"]
        if settings[f"{kind}_strategy"] == "steps" and steps is not None and not steps > 0:
            raise UserError(
                f"{kind}_steps must be above 0, got {steps}: --{kind}_strategy no turns it off (--{kind}_steps)"
            )


def _require_object(name: str, value: Any) -> None:
    if not isinstance(value, str):
        return
    try:
        is_object = isinstance(json.loads(value), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise UserError(f"{name} is {value!r}: write a JSON object, as '{{\"name\": 1}}' (--{name})")


def _require_device(use_cpu: bool, defaults: Mapping[str, Any]) -> None:
    """Where DeepSpeed trains is not asked of the Trainer."""
    if use_cpu != defaults.get("use_cpu", use_cpu):
        device = "on GPUs" if use_cpu else "without a GPU"
        raise UserError(
            f"use_cpu is {str(use_cpu).lower()}, and DeepSpeed trains {device}: leave it out, DS_ACCELERATOR=cpu or "
            "cuda in the environment decides that (--use_cpu)"
        )
