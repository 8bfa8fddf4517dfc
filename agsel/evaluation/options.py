"""Settings of `launch/evaluate.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from agsel.errors import ParserComplaints, UserError
from agsel.evaluation.answers import NUMBER

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EvaluationArguments:
    """What to evaluate, and how.

    Raises:
        UserError: a setting is out of its range; the message names the flag.
    """

    model: str = field(metadata={"help": "Folder or hub name of a model or adapter, or elements.safetensors."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Rows to judge: hub name, folder, or file. With one task in `--tasks` its rows.",
            "aliases": ["--dataset"],
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(
        default="train", metadata={"help": "For example train[6973:]; a local file's only split is train."}
    )
    tasks: str | None = field(
        default=None,
        metadata={
            "help": "`gsm8k`, `math`, or both with a comma between them; from the hub, or from files, "
            "`gsm8k=test.jsonl,math=math.jsonl`. GSM8K is judged by the number after ####, else the last one; MATH by "
            "the package math-verify."
        },
    )
    n_shot: int = field(
        default=0,
        metadata={
            "help": "Solved examples before each prompt: of gsm8k from the hub those of its training data, else the "
            "first rows, which are then not judged."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Judge only the first rows of each task."})
    perplexity: str | None = field(
        default=None,
        metadata={"help": "A plain text file: its perplexity tells what a model has forgotten."},
    )
    lm_eval: str | None = field(
        default=None,
        metadata={
            "help": "Tasks of lm-evaluation-harness, with commas between them: their names, or YAML files. Where it "
            "judges a prompt of `--tasks` or `--dataset` too, other verdicts are listed."
        },
    )
    batch_size: int = field(
        default=512,
        metadata={"help": "Rows at a time, at most: fewer where memory ends. Results depend on it by rounding only."},
    )
    memory_fraction: float = field(
        default=1.0,
        metadata={"help": "Of the GPU's memory, at most, for this evaluation: where others share the GPU."},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Generated at most per row."})
    answer_pattern: str = field(
        default=NUMBER,
        metadata={
            "help": "Regular expression of an answer in `--dataset`; its last match counts, or that match's first "
            "group if it has one. Numbers are compared by value. Default: the last number."
        },
    )
    skip_generation: bool = field(default=False, metadata={"help": "Only the answer NLL, which is much faster."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16, or auto: as saved."})
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSON file for the results; one line for each row goes beside it, into a file that ends in .jsonl. "
            "An evaluation that was killed goes on with the same command."
        },
    )

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value} (--{name}): it must be at least 1")
        if not 0 < self.memory_fraction <= 1:
            raise UserError(
                f"memory_fraction is {self.memory_fraction} (--memory_fraction): it must be above 0 and at most 1"
            )
        if self.n_shot < 0:
            raise UserError(f"n_shot is {self.n_shot} (--n_shot): it must be at least 0")
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r} (--dtype): use {', '.join(DTYPES)}")
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise UserError(
                f"{self.answer_pattern!r} is no regular expression (--answer_pattern), {error}: correct it, or put "
                "a backslash before a character that stands for itself"
            ) from error
        if not any((self.dataset_name, self.tasks, self.perplexity, self.lm_eval)):
            raise UserError("nothing to judge: name rows (--dataset), --tasks, --perplexity or --lm_eval")
        if self.n_shot and not (self.dataset_name or self.tasks):
            raise UserError("--n_shot is of --tasks or --dataset: name some, or leave it out")
        if self.limit and not (self.dataset_name or self.tasks or self.lm_eval):
            raise UserError("--limit is of --tasks, --dataset or --lm_eval: name some, or leave it out")
        if self.answer_pattern != NUMBER and (self.tasks or not self.dataset_name):
            raise UserError("--answer_pattern is of --dataset without --tasks, which have their own: leave one out")


class EvaluationParser(ParserComplaints, HfArgumentParser):
    """Of `EvaluationArguments` and the columns."""
