"""What a run needs of the model's tokenizer and its chat template."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset
from peft.utils.other import TrainableTokensWrapper
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, Trainer
from trl import ModelConfig, SFTConfig

from agsel.data.tokens import Encoder, Learning, first_conversation
from agsel.errors import UserError, not_here_either, one_line
from agsel.evaluation.limits import learnt_positions
from agsel.training.model import loading
from agsel.zero.parameters import global_shape

RESIZE = "resize its embedding and save it, or use the tokenizer that belongs to it"


def load_tokenizer(model: ModelConfig, training: SFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model.

    Raises:
        UserError: it cannot be loaded.
    """
    name = model.model_name_or_path
    with loading(f"the tokenizer of {name}", ": bring its files, or download the model anew"):
        return AutoTokenizer.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=training.trust_remote_code
        )


def require_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, training: SFTConfig) -> None:
    """Refuse a tokenizer that cannot end a text, or has tokens that the model does not know.

    Of its special tokens some may be outside the model, as that of images is in text models of Gemma 3:
    `require_known_tokens` looks whether they occur. A tokenizer that `--chat_template_path` names brings its tokens
    along, and TRL makes room for them.

    Raises:
        UserError: it has no end-of-sequence token, or one of its tokens is not in the embedding.
    """
    if _is_tokenizer(training.chat_template_path):
        _with_named_template(tokenizer, training.chat_template_path)
        return
    _require_named_tokens(tokenizer, training)
    rows = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if rows is None:
        return
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {tokenizer.convert_tokens_to_ids(token) for token in _ending_and_padding(tokenizer, training)}
    number = max({*tokenizer.get_vocab().values()} - special | used)
    if number >= rows:
        raise _unknown_token(tokenizer, number, rows)


def require_known_tokens(trainer: Trainer) -> None:
    """Check the trainer's tokenised rows: the model has an embedding of every token in them.

    Raises:
        UserError: names a token that it lacks.
    """
    rows = global_shape(trainer.model.get_input_embeddings().weight)[0]
    for dataset in filter(None, (trainer.train_dataset, trainer.eval_dataset)):
        number = _largest_token(dataset)
        if number >= rows:
            raise _unknown_token(trainer.processing_class, number, rows)


def require_plain_head(trainer: Trainer) -> None:
    """Refuse adapters for new tokens in a head that is tied to the embedding: TRL's loss does not know such a head.

    Raises:
        UserError: names the setting.
    """
    if isinstance(trainer.model.get_output_embeddings(), TrainableTokensWrapper):
        raise UserError(
            f"--chat_template_path {trainer.args.chat_template_path} brings tokens that the model lacks, and TRL's "
            "loss takes no adapters for them from a head tied to its embedding: name a template of tokens that the "
            "model has, or leave out --use_peft"
        )


def require_known_positions(trainer: Trainer) -> None:
    """Check the trainer's tokenised rows: a model that has learnt its positions one by one has none for longer rows.

    Raises:
        UserError: a row is too long.
    """
    limit = learnt_positions(trainer.model)
    if limit is None:
        return
    for dataset in filter(None, (trainer.train_dataset, trainer.eval_dataset)):
        longest = pc.max(pc.list_value_length(dataset.data.column("input_ids"))).as_py()
        if longest > limit:
            raise UserError(
                f"a row has {longest:,} tokens, and the model has learnt positions for {limit:,}: set --max_length "
                f"{limit}"
            )


def require_chat_template(
    tokenizer: PreTrainedTokenizerBase, training: SFTConfig, rows: Dataset, learning: Learning
) -> None:
    """Refuse conversations without a chat template that takes the first of them.

    Args:
        tokenizer: of the model.
        training: may name another template.
        rows: of `agsel.data.formats`.
        learning: what is learnt of them.

    Raises:
        UserError: there is no template, it fails, or it does not tell what the assistant says.
    """
    first = first_conversation(rows)
    if first is not None:
        Encoder(_with_named_template(tokenizer, training.chat_template_path), learning).encode(rows[first])


def _is_tokenizer(chat_template_path: str | None) -> bool:
    """Whether TRL takes it for a tokenizer with a template; else it is the file of one, or nothing."""
    is_file = str(chat_template_path).endswith((".jinja", ".j2")) and Path(str(chat_template_path)).is_file()
    return chat_template_path is not None and not is_file


def _require_named_tokens(tokenizer: PreTrainedTokenizerBase, training: SFTConfig) -> None:
    name = tokenizer.name_or_path
    for setting in ("eos_token", "pad_token"):
        token = getattr(training, setting)
        if token is not None and token not in tokenizer.get_vocab():
            raise UserError(f"{token!r} is no token of the tokenizer of {name}: name one of its tokens (--{setting})")
    if training.eos_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {name} has no end-of-sequence token, by which a model learns to stop: name one of its "
            "tokens (--eos_token), or set eos_token in its tokenizer_config.json"
        )


def _ending_and_padding(tokenizer: PreTrainedTokenizerBase, training: SFTConfig) -> tuple[str, str]:
    """As TRL chooses them."""
    ending = training.eos_token or tokenizer.eos_token
    return ending, training.pad_token or tokenizer.pad_token or ending


def _unknown_token(tokenizer: PreTrainedTokenizerBase, number: int, rows: int) -> UserError:
    token = tokenizer.convert_ids_to_tokens(number)
    return UserError(
        f"the tokenizer of {tokenizer.name_or_path} (--model_name_or_path) has {len(tokenizer):,} tokens, but the "
        f"model has an embedding of {rows:,}: token {number}, {token!r}, is none of them; {RESIZE}"
    )


def _largest_token(rows: Dataset) -> int:
    """Without reading the rows one by one: datasets are large."""
    chunks = (chunk.flatten().to_numpy() for chunk in rows.data.column("input_ids").chunks)
    return max((int(tokens.max()) for tokens in chunks if len(tokens)), default=0)


def _with_named_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer with the template that is named, where one is."""
    if path is None:
        return tokenizer
    try:
        if _is_tokenizer(path):
            return AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        said = one_line(error).rstrip(".") + not_here_either(path, "file or folder")
        raise UserError(f"cannot read the chat template {path} (--chat_template_path): {said}") from error
    return tokenizer
