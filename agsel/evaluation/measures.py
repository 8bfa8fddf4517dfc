"""What is asked of the model: how likely the right answers are, and which ones it gives itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from agsel.errors import RunError
from agsel.evaluation.batches import padded
from agsel.evaluation.questions import Example

Item = TypeVar("Item")
Result = TypeVar("Result")


REPEATABLE = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""Kernels of attention that compute the same bits each time. cuDNN's, which torch prefers on an H200, does not with a
mask: then some greedy texts in bf16 take another turn."""


@sdpa_kernel([*REPEATABLE])
def token_losses(model: nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """float32 [counted tokens] of each example: their negative log-likelihood, in nats."""
    device = next(model.parameters()).device
    tokens = padded([example.sequence for example in examples], 0, device)
    attended = padded([[1] * len(example.sequence) for example in examples], 0, device)
    # Nothing predicts the first token of all.
    counted = padded([example.counted for example in examples], 0, device)[:, 1:].bool()
    logits = model(input_ids=tokens, attention_mask=attended).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits[counted].float(), tokens[:, 1:][counted], reduction="none")
    return list(losses.split(counted.sum(1).tolist()))


@sdpa_kernel([*REPEATABLE])
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> list[str]:
    """The greedy continuation of each prompt, without special tokens, up to the first of the texts in `stop`."""
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    tokens = padded(prompts, settings.pad_token_id, model.device, left=True)
    attended = padded([[1] * len(prompt) for prompt in prompts], 0, model.device, left=True)
    with _own_settings_aside(model):
        output = model.generate(
            input_ids=tokens,
            attention_mask=attended,
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([StopAtTexts(tokenizer, stop, tokens.shape[1])] if stop else []),
        )
    texts = tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
    return [_until(text, stop) for text in texts]


@contextmanager
def _own_settings_aside(model: nn.Module) -> Iterator[None]:
    """Inside, `generate` does not fill up its settings with the model's, as a penalty on what stands in the prompt.

    That would not be greedy, and would count the padding, which is another one in each batch.
    """
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    own = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, settings in zip(owners, own, strict=True):
            owner.generation_config = settings


class StopAtTexts(StoppingCriteria):
    """Ends a row that says one of some texts. `stop_strings` of transformers does not take every tokenizer.

    Args:
        tokenizer: of the model.
        stop: the texts.
        start: number of tokens before those that are generated.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start
        self._tail = max(map(len, stop)) + 1  # tokens that hold the text, if each has a character

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """bool [rows]: whether the last token completes one of the texts."""
        tails = self._tokenizer.batch_decode(input_ids[:, max(self._start, input_ids.shape[1] - self._tail) :])
        return torch.tensor([any(word in tail for word in self._stop) for tail in tails], device=input_ids.device)


def _until(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.index(word) for word in stop if word in text), default=len(text))]


def greedy_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Greedy decoding that ends at the tokenizer's end-of-sequence token or at any that the model knows."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    padding = tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({*ends, tokenizer.eos_token_id}),
        pad_token_id=tokenizer.eos_token_id if padding is None else padding,
    )


def in_parts(work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    """Do work on all items together, or, where the GPU has no memory for that, on halves of them one after the other.

    Raises:
        RunError: a single item does not fit.
    """
    try:
        return work(items)
    except torch.OutOfMemoryError as error:
        if len(items) == 1:
            raise RunError(
                "the GPU has no memory for a single row: shorten it (--max_new_tokens), load the model in 16 bits "
                "(--dtype bfloat16), or use a GPU that nobody else uses"
            ) from error
    torch.cuda.empty_cache()
    middle = len(items) // 2
    return in_parts(work, items[:middle]) + in_parts(work, items[middle:])
