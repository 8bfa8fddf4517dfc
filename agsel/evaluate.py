"""Measure a model on held-out rows: how likely the right answers are, and how many it gives itself.

    deepspeed --num_gpus 4 --module agsel.evaluate --model runs/mine/model --tasks gsm8k --output after.json
    python -m agsel.evaluate --model runs/mine/model --dataset heldout.jsonl --prompt_field question \
        --completion_field answer --completion_template " {answer}"

`nll` is the mean negative log-likelihood of the completions' tokens, end-of-sequence token included, in nats; text
becomes tokens as in training. Of a conversation the last turn of the assistant is the completion. `accuracy` is the
share of rows where greedy generation and the completion have the same answer. The rows are divided among the ranks, and
the results are those of one rank.
"""

import agsel.commands  # noqa: F401  # before what it looks for

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from agsel.data.fields import Fields, with_line_breaks
from agsel.data.sources import Source
from agsel.errors import complaints_of_libraries, require_known
from agsel.evaluation.answers import judge_by_pattern
from agsel.evaluation.findings import (
    as_lines,
    describe_rows,
    prepare_output,
    print_results,
    summarise,
    summarise_text,
    write_complete,
)
from agsel.evaluation.harness import evaluate_with_harness, require_tasks, tasks_of_harness
from agsel.evaluation.kept import KeptResults
from agsel.evaluation.limits import require_embedded, window_of
from agsel.evaluation.loading import fingerprint_of_files, limit_memory, load_model, own_device
from agsel.evaluation.options import EvaluationArguments, EvaluationParser
from agsel.evaluation.questions import read_questions, read_text
from agsel.evaluation.tasks import Task, read_tasks
from agsel.evaluation.work import Measured, Measurer, Part, Unit, cut_into_units, put_together, share_of
from agsel.monitor.progress import Progress
from agsel.runs.ranks import PATIENCE, ends_in_one_line, join_ranks, warn_on_one_rank
from agsel.runs.watchdog import watched_ranks
from agsel.zero.consensus import first_rank_does, gather

TEXT = "perplexity"
KINDS = {"losses": "likelihoods", "texts": "answers"}
"""Kinds of units, and what people are told of them."""
OF_LAUNCHER = "--local_rank"
"""DeepSpeed's launcher gives it to every script."""


def main() -> None:
    """Print the results, one a line, and write them to `--output`."""
    with ends_in_one_line():
        arguments, fields = read_arguments(sys.argv[1:])
        tasks = tasks_of(arguments, fields)
        join_ranks()
        warn_on_one_rank()
        if arguments.lm_eval:
            require_tasks(tasks_of_harness(arguments.lm_eval))
        with watched_ranks(PATIENCE):
            evaluate(arguments, tasks)
    dist.destroy_process_group()


def read_arguments(words: Sequence[str]) -> tuple[EvaluationArguments, Fields]:
    """The command line.

    Raises:
        UserError: a setting is unknown or out of its range.
    """
    parser = EvaluationParser((EvaluationArguments, Fields), description=__doc__, allow_abbrev=False)
    own = [word for word in words if not word.startswith(OF_LAUNCHER)]
    with complaints_of_libraries():
        words = with_line_breaks(own)
        arguments, fields, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    require_known(rest, {*vars(arguments), *vars(fields)}, "on the command line")
    return arguments, fields


def tasks_of(arguments: EvaluationArguments, fields: Fields) -> list[Task]:
    """What is to be judged.

    Raises:
        UserError: tasks and data do not fit together.
    """
    source = None
    if arguments.dataset_name is not None:
        source = Source(
            arguments.dataset_name,
            arguments.dataset_split,
            arguments.dataset_config,
            flag="--dataset",
            split_flags="--dataset_split",
        )
    if arguments.tasks is not None:
        return read_tasks(arguments.tasks, "--tasks", source, fields)
    return [Task("rows", source, fields, judge_by_pattern(arguments.answer_pattern))] if source else []


def evaluate(arguments: EvaluationArguments, tasks: Sequence[Task]) -> None:
    """Measure everything that is asked for. Every rank must call it; the first one says and writes what was found."""
    limit_memory(own_device(), arguments.memory_fraction)  # NCCL must know the device before the ranks say anything
    output = Path(arguments.output) if arguments.output else None
    if output is not None:
        first_rank_does(partial(prepare_output, output), None)
    model, tokenizer = load_model(arguments.model, arguments.dtype)
    parts = first_rank_does(partial(read_parts, arguments, tasks, tokenizer, window_of(model)), None)
    require_embedded(model, parts)
    units = cut_into_units(model, parts, arguments.batch_size)
    kept = KeptResults(output.with_suffix(".parts"), describe(arguments, parts, units)) if output else None
    begin = time.monotonic()
    measured = measure(Measurer(model, tokenizer, parts), units, kept)
    say_measured(parts, time.monotonic() - begin)
    rows = put_together(parts, units, measured)
    results = summary(arguments, tasks, parts, rows)
    lines = [line for part, of_part in zip(parts, rows, strict=True) for line in describe_rows(part, of_part)]
    if arguments.lm_eval:
        results["lm_eval"] = evaluate_with_harness(arguments, model, tokenizer, lines)
    if dist.get_rank() == 0:
        print_results(results)
    if output is not None and kept is not None:
        first_rank_does(partial(write, output, results, lines, kept), None)


def read_parts(
    arguments: EvaluationArguments, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, window: int
) -> list[Part]:
    """All rows as tokens, and a plain text in windows.

    Raises:
        UserError: no such data, or a row that cannot be judged.
    """
    generates = not arguments.skip_generation
    parts = [
        Part.of(
            task,
            read_questions(task, tokenizer, n_shot=arguments.n_shot, limit=arguments.limit, generates=generates),
            arguments.max_new_tokens if generates else None,
        )
        for task in tasks
    ]
    if arguments.perplexity is not None:
        parts.append(Part(TEXT, read_text(arguments.perplexity, tokenizer, window)))
    return parts


def describe(arguments: EvaluationArguments, parts: Sequence[Part], units: Sequence[Unit]) -> dict[str, Any]:
    """All by which the results of one evaluation differ from those of another, as plain values."""
    return {
        "model": fingerprint_of_files(arguments.model),
        "dtype": arguments.dtype,
        "parts": [part.fingerprint() for part in parts],
        "units": [list(unit) for unit in units],
    }


def measure(measurer: Measurer, units: Sequence[Unit], kept: KeptResults | None) -> dict[int, list[Measured]]:
    """The results of all units by their numbers, on every rank. Each does its share of those that are not kept."""
    done = first_rank_does(kept.begin, None) if kept else {}
    if done and dist.get_rank() == 0:
        print(f"goes on   {len(done)} of {len(units)} batches were measured before")
    left = [number for number in range(len(units)) if number not in done]
    for kind, said in KINDS.items():
        mine = share_of(
            [number for number in left if units[number].kind == kind], dist.get_rank(), dist.get_world_size()
        )
        rows = sum(len(units[number].rows) for number in mine)
        with Progress(said, rows, shown=dist.get_rank() == 0) as progress:
            for number in mine:
                done[number] = measurer.measure(units[number])
                if kept is not None:
                    kept.add(dist.get_rank(), number, done[number])
                progress.advance(len(units[number].rows))
    return {number: found for of_rank in gather(done, None) for number, found in of_rank.items()}


def say_measured(parts: Sequence[Part], seconds: float) -> None:
    """How long it took: not among the results, which are the same on every machine of a kind."""
    if parts and dist.get_rank() == 0:
        rows, ranks = sum(len(part.examples) for part in parts), dist.get_world_size()
        print(f"measured  {rows:,} rows in {seconds:.1f} s on {ranks} rank{'s' if ranks > 1 else ''}")


def write(output: Path, results: dict[str, Any], lines: Sequence[dict[str, Any]], kept: KeptResults) -> None:
    """The rows, then the numbers; what was kept until then goes.

    Raises:
        UserError: a file cannot be written.
    """
    write_complete(output.with_suffix(".jsonl"), as_lines(lines))
    write_complete(output, json.dumps(results, indent=1) + "\n")
    kept.end()


def summary(
    arguments: EvaluationArguments, tasks: Sequence[Task], parts: Sequence[Part], rows: Sequence[list[Measured]]
) -> dict[str, Any]:
    """The numbers of the whole; those of the only task stand beside the name of the model."""
    results: dict[str, Any] = {"model": arguments.model}
    by_task = {
        task.name: {"dataset": task.source.name, "split": task.source.split} | summarise(part, of_part)
        for task, part, of_part in zip(tasks, parts, rows, strict=False)
    }
    results |= next(iter(by_task.values())) if len(by_task) == 1 else {"tasks": by_task} if by_task else {}
    return results | (summarise_text(rows[-1]) if arguments.perplexity is not None else {})


if __name__ == "__main__":
    main()
