"""The DeepSpeed configuration of `--deepspeed`, read and checked before DeepSpeed sees it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedConfig
from pydantic import ValidationError

from agsel import shipped
from agsel.errors import UserError, one_line

REFUSED_ZERO_SETTINGS = ("offload_optimizer", "offload_param", "zenflow", "elastic_checkpoint")
"""What `agsel.attach` would refuse; DeepSpeed stumbles over some of it earlier, in many lines."""
TAKEN_OVER = {
    "optimizer": "an `optimizer` section: remove it, agsel makes an AdamW with one param group per block",
    "scheduler": "a `scheduler` section, which would take the place of --lr_scheduler_type: remove it",
}
AUTO = "auto"
FILLED = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "train_batch_size": None,
    "gradient_clipping": 1.0,
    "bf16.enabled": False,
    "fp16.enabled": False,
    "zero_optimization.reduce_bucket_size": 1,
    "zero_optimization.stage3_prefetch_bucket_size": 1,
    "zero_optimization.stage3_param_persistence_threshold": 1,
}
"""Where transformers puts a value in place of "auto", and one that it could put there."""
NEEDED = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
"""Without these DeepSpeed fails, or takes other steps than the Trainer; and the settings that say the same."""


def require_deepspeed(settings: dict[str, Any]) -> None:
    """Refuse settings that agsel cannot train or export with, or that DeepSpeed would not take.

    Raises:
        UserError: names the first of them.
    """
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError("zero_optimization is no JSON object (--deepspeed): use zero1, zero2 or zero3")
    _require_supported(zero)
    for name, what in TAKEN_OVER.items():
        if name in settings:
            raise UserError(f"the DeepSpeed configuration (--deepspeed) has {what}")
    for name, setting in NEEDED.items():
        if name not in settings:
            raise UserError(f'{name} is missing (--deepspeed): write "auto" for it, which is --{setting}')
    for name in _open_values(settings):
        if name not in FILLED:
            raise UserError(
                f'{name} is "auto" (--deepspeed), and nothing fills it in: give it a value, or leave it out'
            )
    _require_taken(settings)


def _require_supported(zero: dict[str, Any]) -> None:
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


def _require_taken(settings: dict[str, Any]) -> None:
    """Let DeepSpeed read them as it will when they are filled in."""
    filled = copy.deepcopy(settings)
    filled.pop("train_batch_size", None)  # the number of ranks is not known yet, and transformers compares it
    for name in [*_open_values(filled)]:
        *path, last = name.split(".")
        section = filled
        for step in path:
            section = section[step]
        section[last] = FILLED.get(name, 1)
    try:
        DeepSpeedConfig(filled)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"]))
        raise UserError(f"DeepSpeed does not take {name} (--deepspeed): {fault['msg']}") from error
    except Exception as error:
        raise UserError(f"DeepSpeed does not take its settings (--deepspeed): {one_line(error)}") from error


def _open_values(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The names, with dots, of all that is "auto"."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _open_values(value, f"{prefix}{name}.")
        elif value == AUTO:
            yield prefix + name


def read_deepspeed(deepspeed: Any) -> dict[str, Any]:
    """The DeepSpeed settings: of a file, of a shipped one by its name, as JSON, or as they stand in a YAML file."""
    settings = deepspeed
    if isinstance(deepspeed, str):
        file = None if deepspeed.startswith("{") else _deepspeed_file(deepspeed)
        try:
            settings = json.loads(file.read_text(encoding="utf-8-sig") if file else deepspeed)
        except ValueError as error:
            raise UserError(f"{deepspeed} is no JSON (--deepspeed): {error}") from error
    if not isinstance(settings, dict):
        raise UserError("the DeepSpeed settings are no JSON object (--deepspeed): zero1, zero2 and zero3 are examples")
    return {"gradient_clipping": AUTO} | settings


def _deepspeed_file(name: str) -> Path:
    path = Path(name) if Path(name).is_file() else shipped.zero_configuration(name)
    if path is None:
        raise UserError(
            f"no such file: {name} (--deepspeed); shipped by name are {', '.join(shipped.names('ds_configs'))}"
        )
    return path
