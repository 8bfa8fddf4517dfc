"""What a run needs of its model and tokenizer, asked before the ranks load them together."""

from __future__ import annotations

from pathlib import Path

import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig, SFTConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import is_conversational

from agsel.errors import UserError, complaints_of_libraries


def require_model(model: ModelConfig, training: SFTConfig) -> None:
    """Refuse a model by its name.

    Raises:
        UserError: it is not there, or generates no text.
    """
    name = model.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=training.trust_remote_code
        )
    except (OSError, ValueError) as error:
        where = "" if Path(name).exists() else "no such folder here, and from the hub: "
        raise UserError(f"cannot load {name} (--model_name_or_path): {where}{error}") from error
    for architecture in config.architectures or ():
        known = getattr(transformers, architecture, None)
        if known is not None and not known.can_generate():
            raise UserError(
                f"{name} (--model_name_or_path) is a {architecture}, which generates no text: use a decoder model"
            )


def require_chat_template(model: ModelConfig, training: SFTConfig, rows: Dataset) -> None:
    """Refuse messages without a chat template that fits; one that is named (`--chat_template_path`) is TRL's to check.

    Raises:
        UserError: the tokenizer has no template, or one that does not mark the words of the assistant if only these
            are learnt.
    """
    if training.chat_template_path is not None or not is_conversational(rows[0]):
        return
    name = model.model_name_or_path
    with complaints_of_libraries():
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=training.trust_remote_code
        )
    if tokenizer.chat_template is None:
        raise UserError(
            f"the dataset holds messages, but the tokenizer of {name} has no chat template: name one "
            "(--chat_template_path), or make text of the columns (--prompt_template, --completion_template)"
        )
    if training.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        try:
            get_training_chat_template(tokenizer)
        except ValueError as error:
            raise UserError(
                f"the chat template of {name} does not tell which words are the assistant's: name one with generation "
                "markers (--chat_template_path), or learn from all words (--assistant_only_loss false)"
            ) from error
