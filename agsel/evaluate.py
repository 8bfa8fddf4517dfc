"""Measure a model on held-out prompts: how likely the right answers are, and how many it gives itself.

    python -m agsel.evaluate --model runs/demo/model --dataset runs/demo/data/two_step_heldout.jsonl \
        --prompt_field question --completion_field answer --completion_template " {answer}" --output after.json

`nll` is the mean negative log-likelihood of the completions' tokens, end-of-sequence token included, in nats; text
becomes tokens as in TRL's SFTTrainer. `accuracy` is the share of rows where greedy generation and the completion end
in the same number (`--answer_pattern`). Runs on one GPU, else on the CPU.
"""

import agsel.commands  # noqa: F401  # before what it looks for

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from agsel.data.fields import Fields, with_line_breaks
from agsel.data.formats import read_rows
from agsel.data.sources import Source
from agsel.data.tokens import Learning, encode_text
from agsel.errors import UserError, complaints_of_libraries
from agsel.runs.ranks import ends_in_one_line


@dataclass
class EvaluationArguments:
    """What to evaluate, and how."""

    model: str = field(metadata={"help": "Hugging Face folder or hub name."})
    dataset_name: str = field(
        metadata={"help": "Hub name, or .json, .jsonl or .parquet file.", "aliases": ["--dataset"]},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(
        default="train", metadata={"help": "For example train[6973:]; a local file's only split is train."}
    )
    limit: int | None = field(default=None, metadata={"help": "Evaluate only the first rows."})
    batch_size: int = field(default=32, metadata={"help": "Rows at a time. It changes speed and memory only."})
    max_new_tokens: int = field(default=256, metadata={"help": "Generated at most per row."})
    answer_pattern: str = field(
        default=r"-?\d[\d,]*(?:\.\d+)?",
        metadata={
            "help": "Regular expression of an answer; its last match counts, or that match's first group if it has "
            "one. Numbers are compared by value. Default: the last number, which also suits GSM8K's `#### 42`."
        },
    )
    skip_generation: bool = field(default=False, metadata={"help": "Only the answer NLL, which is much faster."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16, or auto: as saved."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results and every generated text."})

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value} (--{name}): it must be at least 1")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UserError(f"unknown dtype {self.dtype!r} (--dtype): use auto, float32, bfloat16 or float16")
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise UserError(
                f"{self.answer_pattern!r} is no regular expression (--answer_pattern), {error}: correct it, or put "
                "a backslash before a character that stands for itself"
            ) from error


class Example(NamedTuple):
    """A row as tokens. `sequence[start:]` are the tokens of the completion; the model generates from `prompt`."""

    prompt: list[int]
    sequence: list[int]
    start: int


def encode(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A row as it is tokenised for training."""
    tokens = encode_text(tokenizer, prompt, completion, Learning())
    return Example(tokenizer(prompt)["input_ids"], tokens.ids, tokens.learnt.index(True))


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of rows of similar lengths, longest first: too large a batch fails at once."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def token_losses(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """float32 [completion tokens of all examples]: the negative log-likelihood of each, in nats."""
    device = next(model.parameters()).device
    rows = [torch.tensor(example.sequence) for example in examples]
    tokens = pad_sequence(rows, batch_first=True).to(device)
    attended = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    targets = tokens.masked_fill(attended == 0, -100)
    for row, example in zip(targets, examples, strict=True):
        row[: example.start] = -100
    logits, targets = model(input_ids=tokens, attention_mask=attended).logits[:, :-1], targets[:, 1:]
    counted = targets != -100
    return nn.functional.cross_entropy(logits[counted].float(), targets[counted], reduction="none")


def answer_loss(model: nn.Module, examples: Sequence[Example], batch_size: int) -> tuple[float, int]:
    """(mean negative log-likelihood per completion token in nats, number of these tokens)."""
    lengths = [len(example.sequence) for example in examples]
    losses = [
        token_losses(model, [examples[row] for row in rows]).double().cpu() for rows in batches(lengths, batch_size)
    ]
    return torch.cat(losses).mean().item(), sum(map(len, losses))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """The greedy continuation of each prompt, without special tokens."""
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    texts = [""] * len(examples)
    for rows in batches([len(example.prompt) for example in examples], batch_size):
        prompts = tokenizer.pad({"input_ids": [examples[row].prompt for row in rows]}, return_tensors="pt")
        output = model.generate(**prompts.to(model.device), generation_config=settings)
        continuations = output[:, prompts["input_ids"].shape[1] :]
        for row, text in zip(rows, tokenizer.batch_decode(continuations, skip_special_tokens=True), strict=True):
            texts[row] = text
    return texts


def greedy_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Greedy decoding that ends at the tokenizer's end-of-sequence token or at any that the model knows."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({*ends, tokenizer.eos_token_id}),
        pad_token_id=tokenizer.pad_token_id,
    )


def extract_answer(text: str, pattern: str) -> str | float | None:
    """The last match of `pattern`, or of its first group; a number if it reads as one, `1,000` included."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    answer = (matches[-1].group(1 if matches[-1].re.groups else 0) or "").strip()
    try:
        return float(answer.replace(",", ""))
    except ValueError:
        return answer


def judge(rows: Sequence[dict[str, str]], texts: Sequence[str], pattern: str) -> list[dict[str, Any]]:
    """What was asked, expected and generated, and whether the answer is right.

    Raises:
        UserError: `pattern` does not occur in the completion of a row.
    """
    verdicts = []
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        expected = extract_answer(row["completion"], pattern)
        if expected is None:
            raise UserError(f"no answer in the completion of row {number}: correct --answer_pattern {pattern!r}")
        correct = extract_answer(text, pattern) == expected
        verdicts.append({**row, "generated": text, "correct": correct})
    return verdicts


def load_prompts(arguments: EvaluationArguments, fields: Fields) -> list[dict[str, str]]:
    """The rows to evaluate: `prompt` and `completion` of each.

    Raises:
        UserError: no such data, or rows of messages.
    """
    source = Source(arguments.dataset_name, arguments.dataset_split, arguments.dataset_config)
    rows, _ = read_rows(source, fields)
    if rows.data.column("completion").null_count:
        raise UserError("only rows of prompt and completion texts can be evaluated: name them with --prompt_field")
    rows = rows.select(range(min(len(rows), arguments.limit or len(rows))))
    return rows.select_columns(["prompt", "completion"]).to_list()


def load_model(arguments: EvaluationArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, on the GPU if there is one, and tokenizer, padding on the left.

    Raises:
        UserError: `--model` cannot be loaded, or is the folder of a run.
    """
    folder = Path(arguments.model)
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} (--model) is the folder of a run: name its model, {folder / 'model'}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with complaints_of_libraries():
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def evaluate(arguments: EvaluationArguments, fields: Fields) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(results, one verdict per row unless generation is skipped)."""
    rows = load_prompts(arguments, fields)
    model, tokenizer = load_model(arguments)
    examples = [encode(row["prompt"], row["completion"], tokenizer) for row in rows]
    loss, tokens = answer_loss(model, examples, arguments.batch_size)
    results: dict[str, Any] = {"model": arguments.model, "dataset": arguments.dataset_name}
    results |= {"split": arguments.dataset_split, "rows": len(rows), "completion_tokens": tokens, "nll": loss}
    if arguments.skip_generation:
        return results, []
    texts = generate(model, tokenizer, examples, arguments.batch_size, arguments.max_new_tokens)
    verdicts = judge(rows, texts, arguments.answer_pattern)
    correct = sum(verdict["correct"] for verdict in verdicts)
    return results | {"correct": correct, "accuracy": correct / len(verdicts)}, verdicts


def prepare_output(path: Path) -> None:
    """Make the folder of `--output`, before any work that could be lost.

    Raises:
        UserError: it cannot be made, or `path` is a folder itself.
    """
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: name a file, for example {path / 'results.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder of --output {path}, {error}: choose another file") from error


def main() -> None:
    """Print the results, one a line, and write them to `--output`."""
    with ends_in_one_line():
        parser = HfArgumentParser((EvaluationArguments, Fields), description=__doc__)
        with complaints_of_libraries():
            arguments, fields = parser.parse_args_into_dataclasses(with_line_breaks(sys.argv[1:]))
        if arguments.output:
            prepare_output(Path(arguments.output))
        results, verdicts = evaluate(arguments, fields)
        for name, value in results.items():
            print(f"{name:18}{value:.4f}" if isinstance(value, float) else f"{name:18}{value}")
        if arguments.output:
            Path(arguments.output).write_text(json.dumps({**results, "predictions": verdicts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
