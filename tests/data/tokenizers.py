"""Tiny tokenizers, made on the spot."""

from __future__ import annotations

from itertools import chain
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
CHATML = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def of_bytes(template: str | None, *special: str, merges: tuple[str, ...] = (), **options: Any) -> Any:
    """A token for each byte, for each special token, and for each word whose letters are merged.

    Args:
        template: for chats.
        special: tokens.
        merges: words; a space before a word is one of its letters.
        options: of the tokenizer.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word.replace(" ", "Ġ").replace("\n", "Ċ") for word in merges]
    pairs = list(dict.fromkeys(chain.from_iterable(_pairs(word) for word in words)))
    vocabulary = dict.fromkeys([*letters, *("".join(pair) for pair in pairs)])
    bare = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, pairs))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return _finished(bare, template, special, options)


def of_words(template: str, *words: str, **options: Any) -> Any:
    """A token for each word; space between words is in none of them."""
    bare = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["?", *words])}, unk_token="?"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(bare, template, ("</s>",), options)


def with_added(tokenizer: Any, before: str = "", behind: str = "") -> Any:
    """That puts a token before every text, or behind, or both."""
    tokens = [token for token in (before, behind) if token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {behind}".strip(),
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys(tokens)],
    )
    return tokenizer


def _pairs(word: str) -> list[tuple[str, str]]:
    return [(word[:place], word[place]) for place in range(1, len(word))]


def _finished(bare: Tokenizer, template: str | None, special: tuple[str, ...], options: dict[str, Any]) -> Any:
    bare.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    given = {"eos_token": special[-1], "pad_token": special[-1], "chat_template": template}
    return PreTrainedTokenizerFast(tokenizer_object=bare, **given | options)
