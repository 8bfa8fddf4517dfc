"""How alike `--choose_early` chooses: the layers with the largest gradients of a part of a batch, and of all of it.

    python -m tools.quality.early_choice --model models/smollm2-135m-instruct --rows data/gsm8k/train.jsonl

One process trains all layers in fp32, on the CPU, in plain PyTorch. Of every batch the gradients of the first
micro-batch, of the first half and of all rows are measured. The table on standard output says how many of the layers
with the largest norms are the same, and how much of the squared norm of those of the whole batch the others have.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from agsel.blocks import decoder_layers
from agsel.errors import UserError
from agsel.policies.policy import blocks_of_fraction, largest
from tools.quality.folding import IGNORED, Batch, Row, batches_of, read_rows


class Likeness(NamedTuple):
    """Of a choice by a part of the rows.

    Attributes:
        common: layers that the whole batch chooses, too.
        share: of the squared norm of the whole batch's choice, by the gradients of the whole batch.
    """

    common: int
    share: float


def likeness(part: Sequence[float], whole: Sequence[float], count: int) -> Likeness:
    """Of the `count` layers with the largest norms by a part of the rows, to those by all.

    Args:
        part: gradient norm of each layer.
        whole: the same of the whole batch.
        count: of layers that are chosen.
    """
    chosen, wanted = (largest(dict(enumerate(norms)), count) for norms in (part, whole))
    squares = [norm**2 for norm in whole]
    return Likeness(len(chosen & wanted), sum(squares[i] for i in chosen) / sum(squares[i] for i in wanted))


def step_norms(model: nn.Module, micro_batches: Sequence[Batch]) -> list[list[float]]:
    """The gradient norm of each layer after each micro-batch of a step; the model keeps the gradient of them all."""
    labels = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in micro_batches)
    norms = []
    for batch in micro_batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scores, wanted = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        loss = nn.functional.cross_entropy(scores, wanted, ignore_index=IGNORED, reduction="sum") / labels
        loss.backward()
        norms.append([norm_of(layer) for layer in decoder_layers(model)])
    return norms


def norm_of(layer: nn.Module) -> float:
    """Of its gradients, summed in fp64."""
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in layer.parameters() if p.grad is not None))


def main(words: Sequence[str]) -> None:
    """Print a line for each step, and the means."""
    options = _parser().parse_args(words)
    try:
        rows = _rows(options)
    except (UserError, OSError) as error:
        sys.exit(f"agsel: error: {error}")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(decoder_layers(model).parameters(), lr=options.learning_rate)
    count = blocks_of_fraction(options.fraction, len(decoder_layers(model)))
    size, steps = options.micro_batch * options.accumulation, []
    print(f"| step | of {count} layers, first micro-batch | squared norm | first half | squared norm |")
    print("|---:|---:|---:|---:|---:|", flush=True)
    for step in range(options.steps):
        norms = step_norms(model, batches_of(rows[step * size : (step + 1) * size], options.micro_batch))
        half = norms[options.accumulation // 2 - 1]
        steps.append((*likeness(norms[0], norms[-1], count), *likeness(half, norms[-1], count)))
        print("| {} | {} | {:.3f} | {} | {:.3f} |".format(step, *steps[-1]), flush=True)
        optimizer.step()
        optimizer.zero_grad()
    means = [sum(column) / len(steps) for column in zip(*steps, strict=True)]
    print("| mean | {:.1f} | {:.3f} | {:.1f} | {:.3f} |".format(*means))


def _rows(options: argparse.Namespace) -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = list(read_rows(options.rows, tokenizer, options.most_tokens))
    needed = options.steps * options.micro_batch * options.accumulation
    if options.accumulation < 2:
        raise UserError(f"--accumulation is {options.accumulation}, and there is no part of one: raise it")
    if len(rows) < needed:
        raise UserError(f"{options.rows} has {len(rows)} rows of the {needed} that are needed: lower --steps")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed)).tolist()
    return [rows[place] for place in order[:needed]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--rows", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro_batch", type=int, default=8, help="rows")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--fraction", type=float, default=0.3, help="share of the layers that a step chooses")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--most_tokens", type=int, default=512, help="of a row; longer ones are left out")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
