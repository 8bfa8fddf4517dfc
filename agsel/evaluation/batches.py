"""Which rows go through the model together: the same ones whatever the number of ranks, as a batch changes rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psutil
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from agsel.zero.consensus import gather

SHARE = 0.5
"""Of the free memory, for all that grows with a batch."""
SHARE_OF_HOST = 0.125
"""Of the whole memory of a host, where there is no GPU: a number that does not change with the ranks."""
COPIES_OF_LOGITS = 12
"""Bytes per logit beside the logits themselves: as float32, and two more of that size inside of the cross-entropy."""


def form_batches(lengths: Sequence[int], rows: int, tokens: int) -> Iterator[list[int]]:
    """Positions of rows of similar lengths, the longest first: too large a batch fails at once.

    Args:
        lengths: of the rows, in tokens.
        rows: of a batch, at most.
        tokens: of a batch, padding included, at most; a longer row stands alone.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        fitting = max(1, min(rows, tokens // lengths[order[0]]))
        yield order[:fitting]
        del order[:fitting]


def tokens_in_memory(model: PreTrainedModel, *, generates: bool) -> int:
    """How many tokens fit into a batch, on each rank: a power of two, so that equal machines come to equal batches.

    Args:
        model: on its device.
        generates: the keys and values of every token are kept; otherwise its logits.
    """
    per_token = _bytes_of_cache(model) if generates else _bytes_of_logits(model)
    fitting = min(gather(int(room(model.device) / per_token), None))
    return 1 << max(0, fitting.bit_length() - 1)


def room(device: torch.device) -> float:
    """Bytes for what grows with a batch; on a GPU, of those that this process may have (`loading.limit_memory`)."""
    if device.type != "cuda":
        return SHARE_OF_HOST * psutil.virtual_memory().total
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - reserved
    return SHARE * (max(0.0, min(free, allowed)) + reserved - torch.cuda.memory_allocated(device))


def _bytes_of_logits(model: PreTrainedModel) -> int:
    text = model.config.get_text_config(decoder=True)
    return text.vocab_size * (model.dtype.itemsize + COPIES_OF_LOGITS)


def _bytes_of_cache(model: PreTrainedModel) -> int:
    """Keys and values of a token, as if all heads had their own, which makes up for what passes through a layer."""
    text = model.config.get_text_config(decoder=True)
    return 2 * text.num_hidden_layers * text.hidden_size * model.dtype.itemsize


def padded(rows: Sequence[Sequence[int]], value: int, device: torch.device, *, left: bool = False) -> Tensor:
    """int64 [rows, longest]: filled up with `value` at the end, or on the left."""
    tensors = [torch.tensor(row) for row in rows]
    side = "left" if left else "right"
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side).to(device)
