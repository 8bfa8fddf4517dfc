"""What an evaluation measures, from the definition: one row, one token at a time."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agsel.evaluation.questions import Example


@torch.inference_mode()
def loop_of_losses(model: PreTrainedModel, example: Example) -> list[float]:
    """Negative log-likelihoods of the counted tokens, in nats."""
    logits = model(torch.tensor([example.sequence])).logits[0].double()
    return [
        -torch.log_softmax(logits[place - 1], dim=0)[token].item()
        for place, token in enumerate(example.sequence)
        if example.counted[place] and place
    ]


@torch.inference_mode()
def loop_of_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], new_tokens: int
) -> str:
    """The greedy continuation; the whole text is read again for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new_tokens:
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
