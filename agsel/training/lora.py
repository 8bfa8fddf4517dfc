"""The adapters of a run: which modules get them, asked before the model is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from trl import ModelConfig, get_peft_config

from agsel.blocks import Block, decoder_layers, find_blocks
from agsel.errors import UserError, suggestion

ALL_LINEAR = "all-linear"


def settle_targets(model: ModelConfig, config: PreTrainedConfig, blank: nn.Module | None) -> None:
    """Take a single name in `--lora_target_modules` for a name, where TRL makes a regular expression of it.

    Args:
        model: settings of the run.
        config: of the model that gets adapters.
        blank: of `blank_model`.

    Raises:
        UserError: the model has no such module, or nobody knows what to adapt in it.
    """
    targets = model.lora_target_modules
    if targets is None:
        _require_known_targets(model, config)
    if blank is None:
        return
    names, parameters = ([name for name, _ in found] for found in (blank.named_modules(), blank.named_parameters()))
    _require_names(model.lora_modules_to_save or [], names, "--lora_modules_to_save")
    _require_names(model.lora_target_parameters or [], parameters, "--lora_target_parameters", "parameter")
    if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
        model.lora_target_modules = targets = _name_or_expression(targets, names)
    if isinstance(targets, list):
        _require_names(targets, names, "--lora_target_modules")


def adapter_of(model: ModelConfig, config: PreTrainedConfig, blocks_of: Callable[[nn.Module], list[Block]]) -> Any:
    """PEFT's configuration of the adapters: TRL's, and what PEFT is to know besides.

    That is the revision of the model they belong to, and the layers in which no adapter would ever train: modules there
    get none, unless the model's code is not transformers' own.

    Args:
        model: settings of the run.
        config: of the model that gets adapters.
        blocks_of: a model's blocks that take part.

    Raises:
        UserError: as of `settle_targets` and `blocks_of`, or none of the targets is in a layer that takes part.
    """
    blank = blank_model(config)
    settle_targets(model, config, blank)
    adapter: Any = get_peft_config(model)
    adapter.revision = model.model_revision
    if blank is not None:
        adapter.exclude_modules = left_out = layers_left_out(blank, blocks_of(blank))
        names = [name for name, _ in blank.named_modules() if left_out and not re.fullmatch(left_out, name)]
        if names and not _names_one_of(model.lora_target_modules, names):
            raise UserError(
                "--lora_target_modules names nothing in the layers that take part: name other modules, or choose a "
                "lower layer (--select_from)"
            )
    return adapter


def layers_left_out(model: nn.Module, blocks: Collection[Block]) -> str | None:
    """A regular expression for the modules in the layers that do not take part, None if all do.

    Args:
        model: without adapters.
        blocks: that take part.
    """
    taking_part = {block.name for block in blocks}
    layers = decoder_layers(model)
    left_out = [str(index) for index in range(len(layers)) if f"layers.{index}" not in taking_part]
    path = next(name for name, module in model.named_modules() if module is layers)
    return rf"{re.escape(path)}\.({'|'.join(left_out)})(\..*)?" if left_out else None


def require_taking_part(model: nn.Module, blocks: Collection[Block]) -> None:
    """Refuse adapters, or modules trained beside them, around the layers if only layers are trained.

    Args:
        model: with adapters, if any.
        blocks: that take part.

    Raises:
        UserError: names what would stay as it is.
    """
    names = {block.name for block in blocks}
    around = [b.name for b in find_blocks(model) if b.trainable and not b.is_layer and b.name not in names]
    if around and hasattr(model, "peft_config"):
        raise UserError(
            f"{' and '.join(around)} would not be trained, though --lora_target_modules or --lora_modules_to_save name "
            "them: select among all blocks (--select_blocks all), or leave them out"
        )


def blank_model(config: PreTrainedConfig) -> nn.Module | None:
    """A model that is not loaded, for its names; None if it has code of its own, which is not run before."""
    architecture = getattr(transformers, config.architectures[0], None)
    if architecture is None:
        return None
    with torch.device("meta"):
        return architecture(config)


def _names_one_of(targets: list[str] | str | None, names: Collection[str]) -> bool:
    if isinstance(targets, list):
        return any(_is_named(target, name) for target in targets for name in names)
    return targets is None or targets.lower() == ALL_LINEAR or _is_expression_for(targets, names)


def _name_or_expression(target: str, names: Collection[str]) -> list[str] | str:
    is_name = any(_is_named(target, name) for name in names)
    return target if not is_name and _is_expression_for(target, names) else [target]


def _is_named(target: str, name: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _is_expression_for(target: str, names: Collection[str]) -> bool:
    try:
        return any(re.fullmatch(target, name) for name in names)
    except re.error:
        return False


def _require_names(wanted: Iterable[str], names: Collection[str], setting: str, kind: str = "module") -> None:
    for target in wanted:
        if not any(_is_named(target, name) for name in names):
            alike = suggestion(target, {name.rpartition(".")[2] for name in names})
            raise UserError(f"the model has no {kind} {target!r} ({setting}){alike or ': correct the name'}")


def _require_known_targets(model: ModelConfig, config: PreTrainedConfig) -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # slow to import, and rarely needed

    if not model.lora_target_parameters and config.model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise UserError(
            f"PEFT does not know which modules of a {config.model_type} model to adapt: name them "
            f"(--lora_target_modules), for example {ALL_LINEAR}"
        )
