"""What a run needs of its model, asked before the ranks load it together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import ModelConfig, SFTConfig

from agsel.errors import UserError, not_here_either, one_line
from agsel.training.weights import read_object, require_model_files, require_weights

SAID_TWICE: dict[str, tuple[str, Any]] = {
    "dtype": ("dtype", None),
    "revision": ("model_revision", "main"),
    "attn_implementation": ("attn_implementation", None),
    "trust_remote_code": ("trust_remote_code", False),
}
"""What `--model_init_kwargs` calls a setting, the setting, and its default."""
OTHER_WEIGHTS = {"gguf_file", "subfolder", "transformers_weights", "use_safetensors", "variant"}
"""In `--model_init_kwargs`: the weights are elsewhere than in the usual files."""
DIVIDING = ("tp_plan", "tp_size", "device_map", "device_mesh", "distributed_config", "max_memory")
"""In `--model_init_kwargs`: the model is divided, as only ZeRO may."""


def require_model(model: ModelConfig, training: SFTConfig) -> PreTrainedConfig:
    """Refuse a model by its name, and in a local folder by its files.

    Returns:
        The configuration of the model.

    Raises:
        UserError: it is not there, is damaged, names no architecture, or generates no text.
    """
    _require_attention(model.attn_implementation)
    folder = Path(model.model_name_or_path)
    if folder.is_file():
        raise UserError(
            f"{folder} is a file (--model_name_or_path): name its folder, with config.json and tokenizer; of a GGUF "
            f"""file the name goes to --model_init_kwargs '{{"gguf_file": "{folder.name}"}}'"""
        )
    if folder.is_dir():
        require_model_files(folder)
        _require_known_type(folder)
    config = _load_config(model, training)
    _require_architecture(config, model.model_name_or_path)
    if folder.is_dir() and not OTHER_WEIGHTS & (training.model_init_kwargs or {}).keys():
        require_weights(folder)
    return config


def _require_attention(name: str | None) -> None:
    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)]
    if name is not None and name.rpartition("|")[2] not in known and "/" not in name:
        raise UserError(
            f"no attention {name!r} (--attn_implementation): use {', '.join(known)}, or a kernel of the hub"
        )


def agree_on_settings(model: ModelConfig, training: SFTConfig) -> None:
    """Let `--model_init_kwargs` and the settings of the same meaning say the same: what is given wins over a default.

    Raises:
        UserError: both are given, and differ; or the model would be divided.
    """
    given = dict(training.model_init_kwargs or {})
    dividing = next((name for name in DIVIDING if given.get(name) is not None), None)
    if dividing is not None:
        raise UserError(
            f"--model_init_kwargs {dividing} divides the model in another way than DeepSpeed does: leave it out, ZeRO "
            "divides it (--deepspeed)"
        )
    if "torch_dtype" in given:  # its older name
        given["dtype"] = given.pop("torch_dtype")
    for name, (setting, default) in SAID_TWICE.items():
        holder = model if hasattr(model, setting) else training
        value = getattr(holder, setting)
        if given.get(name, value) == value:
            continue
        if value != default:
            raise UserError(
                f"--{setting} {value} and --model_init_kwargs {name} {given[name]} contradict each other: leave one out"
            )
        setattr(holder, setting, given[name])
    training.model_init_kwargs = given or None


def init_kwargs(model: ModelConfig, training: SFTConfig) -> dict[str, Any]:
    """What `from_pretrained` is told: the user's `--model_init_kwargs`, and the settings that they have agreed on."""
    told = {name: getattr(model, setting) for name, (setting, _) in SAID_TWICE.items() if hasattr(model, setting)}
    return (training.model_init_kwargs or {}) | told


@contextmanager
def known_init_kwargs(training: SFTConfig) -> Iterator[None]:
    """Take a complaint about an unknown argument for one about `--model_init_kwargs`, if it stands there.

    Raises:
        UserError: in place of a TypeError that names it.
    """
    try:
        yield
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in (training.model_init_kwargs or {}):
            raise
        raise UserError(
            f"--model_init_kwargs {unknown[1]} is nothing that the model takes, {one_line(error)}: correct its name"
        ) from error


@contextmanager
def loading(what: str, remedy: str) -> Iterator[None]:
    """Take whatever other packages stumble over for a fault of the file they read; no code of agsel's runs in it.

    Raises:
        UserError: in place of any error.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"cannot load {what} (--model_name_or_path): {one_line(error).rstrip('.')}{remedy}") from error


def _load_config(model: ModelConfig, training: SFTConfig) -> PreTrainedConfig:
    name = model.model_name_or_path
    with loading(name, not_here_either(name)):
        return AutoConfig.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=training.trust_remote_code
        )


def _require_known_type(folder: Path) -> None:
    config = read_object(folder / "config.json")
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING and "auto_map" not in config:
        raise UserError(
            f"{folder / 'config.json'} has the model_type {kind!r}, which transformers {transformers.__version__} does "
            "not know: correct it, or update transformers (--model_name_or_path)"
        )


def _require_architecture(config: PreTrainedConfig, name: str) -> None:
    if not config.architectures:
        wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "LlamaForCausalLM")
        raise UserError(
            f"config.json of {name} (--model_name_or_path) names no architecture: write, for example, "
            f'"architectures": ["{wanted}"]'
        )
    for architecture in config.architectures:
        known = getattr(transformers, architecture, None)
        if known is not None and not known.can_generate():
            raise UserError(
                f"{name} (--model_name_or_path) is a {architecture}, which generates no text: use a decoder model"
            )
