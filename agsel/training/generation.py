"""The generation settings that come with a model: transformers loads some that it refuses to save."""

from __future__ import annotations

import re
from typing import Any

from transformers import GenerationConfig
from trl import ModelConfig

from agsel.errors import UserError, one_line


def require_generation_config(model: ModelConfig) -> None:
    """Refuse a model whose generation_config.json cannot be saved again, even after `mend`.

    Raises:
        UserError: says what is wrong in it.
    """
    name = model.model_name_or_path
    try:
        config = GenerationConfig.from_pretrained(name, revision=model.model_revision)
        mend(config)
        config.validate(strict=True)
    except OSError:  # there is none
        return
    except (ValueError, TypeError) as error:
        raise UserError(
            f"generation_config.json of {name} (--model_name_or_path) could not be saved with the trained model, "
            f"{one_line(error)}: correct it"
        ) from error


def mend(config: GenerationConfig) -> dict[str, Any]:
    """Unset what has no effect, as a temperature without sampling.

    Returns:
        What was unset.
    """
    try:
        config.validate(strict=True)
    except ValueError as error:
        without_effect = re.findall(r"^- `(\w+)`:", str(error), flags=re.MULTILINE)
        return {name: _unset(config, name) for name in without_effect}
    return {}


def _unset(config: GenerationConfig, name: str) -> Any:
    value = getattr(config, name)
    setattr(config, name, None)
    return value
