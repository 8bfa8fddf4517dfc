"""What `--fold_adapters` does to the loss: LoRA trained in bf16 with adapters folded into the weights, and not.

    python tools/quality/folding.py --model models/smollm2-135m-instruct --rows data/gsm8k/train.jsonl

A folded adapter is added to a bf16 copy of its weight, where what is small against the spacing of bf16 numbers may be
lost. Two arms start from the same weights and see the same rows in the same order, on the CPU, in plain PyTorch: AdamW
on fp32 copies of the adapters, rounded to bf16 after each step. At some steps the loss of held-out rows is computed
from each arm's weights in three ways: unfolded, folded, and in fp32. The table on standard output has beside them:

- kept: how much of the adapters' change of their weights is left in the folded ones; 1 is all of it, 0 none
- error: what rounding adds to that change and takes from it, as a share of it (Frobenius norms over all layers)

The same settings give the same numbers on the same machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from agsel.adapters import fuse_adapters
from agsel.blocks import decoder_layers
from agsel.errors import UserError
from agsel.low_rank import FusedLinear

IGNORED = -100
"""The label of tokens that count for no loss."""
WARMUP_STEPS = 5
"""After which the learning rate is constant."""
HELDOUT_BATCH_ROWS = 8

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` and `labels`, each [rows, tokens]."""


class Row(NamedTuple):
    """The tokens of a question and its answer, and how many are the question's."""

    tokens: list[int]
    prompt: int


def read_rows(path: Path, tokenizer: Any, most_tokens: int) -> Iterator[Row]:
    """Rows of GSM8K of at most so many tokens, as the recipe writes them."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {row['answer']}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        if len(prompt) + len(answer) <= most_tokens:
            yield Row(prompt + answer, len(prompt))


def batch_of(rows: Sequence[Row]) -> Batch:
    """Rows padded to the longest; answers alone count."""
    width = max(len(row.tokens) for row in rows)
    shape = (len(rows), width)
    inputs, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for index, (tokens, prompt) in enumerate(rows):
        inputs[index, : len(tokens)], mask[index, : len(tokens)] = torch.tensor(tokens), 1
        labels[index, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


def batches_of(rows: Sequence[Row], size: int) -> list[Batch]:
    """In the order of the rows."""
    return [batch_of(rows[start : start + size]) for start in range(0, len(rows), size)]


def adapted_model(model: nn.Module, rank: int) -> nn.Module:
    """A frozen model with LoRA adapters on all linear layers, in its type, that add nothing yet; in training mode."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    fuse_adapters(decoder_layers(adapted))
    return adapted.train()


def adapted_layers(model: nn.Module) -> list[FusedLinear]:
    """Those that can fold."""
    return [module for module in model.modules() if type(module) is FusedLinear]


def tokens_to_fold(layers: Sequence[FusedLinear]) -> int:
    """The fewest tokens in a batch with which all layers fold."""
    shapes = [layer.base_layer.weight.shape for layer in layers]
    return max(outputs * inputs // (outputs + inputs) + 1 for outputs, inputs in shapes)


def require_folding(layers: Sequence[FusedLinear], batches: Sequence[Batch]) -> None:
    """Every batch folds every layer.

    Raises:
        UserError: one is too small.
    """
    needed, smallest = tokens_to_fold(layers), min(batch["input_ids"].numel() for batch in batches)
    if smallest < needed:
        raise UserError(
            f"all {len(layers)} layers fold in batches of {needed} tokens and more, and one has {smallest}: "
            f"raise --batch_rows, or make --heldout_rows a multiple of {HELDOUT_BATCH_ROWS}"
        )
    print(f"all {len(layers)} layers fold: from {needed} tokens on; the smallest batch has {smallest}", file=sys.stderr)


def set_folding(model: nn.Module, folds: bool) -> None:
    """Of all layers."""
    for layer in adapted_layers(model):
        layer.folds = folds


@torch.no_grad()
def loss_of(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean NLL of the labels, as the model now computes it, summed in fp64."""
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["labels"][:, 1:].flatten()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        chosen = labels != IGNORED
        scores = logits[:, :-1].flatten(0, 1)[chosen].float()
        losses = nn.functional.cross_entropy(scores, labels[chosen], reduction="none")
        total, count = total + losses.double().sum().item(), count + len(losses)
    return total / count


def losses_of(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float, float]:
    """Unfolded, folded, and in fp32, of the same weights."""
    losses = []
    for folds in (False, True):
        set_folding(model, folds)
        losses.append(loss_of(model, batches))
    exact = copy.deepcopy(model).float()
    set_folding(exact, False)
    return losses[0], losses[1], loss_of(exact, batches)


@torch.no_grad()
def rounding(layers: Sequence[FusedLinear]) -> tuple[float, float]:
    """The parts `kept` and `error` of the adapters' changes, see the top of the file; 0 / 0 is not a number."""
    products, squares, errors = torch.zeros(3, dtype=torch.float64)
    for layer in layers:
        weight, down, up = layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight
        scaling = layer.scaling["default"]
        change = (up.float() @ down.float()).mul_(scaling)
        left = torch.addmm(weight, up, down, alpha=scaling).float() - weight.float()
        products += (left * change).sum()
        squares += change.square().sum()
        errors += (left - change).square().sum()
    return (products / squares).item(), (errors / squares).sqrt().item()


class Arm:
    """A model in bf16 and AdamW on fp32 copies of what trains in it."""

    def __init__(self, model: nn.Module, folds: bool, learning_rate: float) -> None:
        self.model, self.folds, self.name = model, folds, "folded" if folds else "unfolded"
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [parameter.detach().float().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, weight_decay=0.0, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS)
        )

    def step(self, batch: Batch) -> float:
        """One of training, with gradients clipped to norm 1. Returns the loss before it."""
        set_folding(self.model, self.folds)
        loss = self.model(**batch).loss
        loss.backward()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)
        return loss.item()

    def measured(self, heldout: Sequence[Batch]) -> list[str]:
        """Cells of the table."""
        losses, parts = losses_of(self.model, heldout), rounding(adapted_layers(self.model))
        return [self.name, *(f"{loss:.4f}" for loss in losses), *(f"{part:.3f}" for part in parts)]


def train(arms: Sequence[Arm], batches: Sequence[Batch], heldout: Sequence[Batch], measure_at: Sequence[int]) -> None:
    """Train all arms, step by step in turn, and print the table."""
    print("| step | arm | loss unfolded | loss folded | loss in fp32 | kept | error |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for step in range(len(batches) + 1):
        for arm in arms if step in measure_at else ():
            print("|", " | ".join([str(step), *arm.measured(heldout)]), "|", flush=True)
        for arm in arms if step < len(batches) else ():
            begun = time.perf_counter()
            loss = arm.step(batches[step])
            seconds = time.perf_counter() - begun
            print(f"step {step + 1}, {arm.name}: loss {loss:.4f}, {seconds:.1f} s", file=sys.stderr)


def compare(options: argparse.Namespace) -> None:
    """Train both arms and print the table.

    Raises:
        UserError: the file has too few rows, or batches are too small to fold.
    """
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = list(read_rows(options.rows, tokenizer, options.most_tokens))
    needed, last = max(options.measure_at) * options.batch_rows, options.heldout_rows
    if len(rows) < needed + last:
        raise UserError(
            f"{options.rows} has {len(rows)} rows of at most {options.most_tokens} tokens, and {needed + last} are "
            "needed: raise --most_tokens, or lower --measure_at"
        )
    batches = batches_of(rows[:needed], options.batch_rows)
    heldout = batches_of(sorted(rows[-last:], key=lambda row: len(row.tokens)), HELDOUT_BATCH_ROWS)
    arms = []
    for folds in (False, True):
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        model = adapted_model(base, options.rank)
        arms.append(Arm(model, folds, options.learning_rate))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", file=sys.stderr)
    require_folding(adapted_layers(arms[0].model), batches + heldout)
    train(arms, batches, heldout, options.measure_at)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    options = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", required=True, help="folder of a model in the format of Hugging Face")
    options.add_argument("--rows", type=Path, required=True, help="GSM8K: JSONL with a question and an answer a line")
    options.add_argument("--measure_at", type=int, nargs="+", default=[0, 5, 15, 30, 60], help="steps; the last ends")
    options.add_argument("--learning_rate", type=float, default=1.6e-3)
    options.add_argument("--rank", type=int, default=256, help="of the adapters, and their alpha")
    options.add_argument("--batch_rows", type=int, default=4)
    options.add_argument("--most_tokens", type=int, default=200, help="in a row; rows with more are left out")
    options.add_argument("--heldout_rows", type=int, default=16, help="the last of those")
    return options


def main() -> None:
    """Compare, or say in one line what is wrong."""
    try:
        compare(parser().parse_args())
    except (UserError, OSError) as error:
        sys.exit(f"agsel: error: {error}")


if __name__ == "__main__":
    main()
