"""What runs on the ranks of tools/bench_scoring.py.

deepspeed --num_gpus 2 --module tools.bench.scored_ranks FOLDER
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedModel

import agsel
from tools.bench.configurations import Configuration
from tools.bench.device import device, elapsed, moment, peak, reset_peak, synchronize
from tools.bench.measured_ranks import joined_folder, origin
from tools.bench.random_model import build_model
from tools.bench.scoring import PLAN, RESULTS, Scoring

Batch = dict[str, torch.Tensor]
LOG_LENGTH = (5.17, 0.353)
"""Mean and standard deviation of log(tokens) of GSM8K's 7,473 rows, by the tokenizer of SmolLM2."""
UNTRAINED = -100


def main() -> None:
    """Measure, and add the result to those of the folder."""
    folder = joined_folder(__doc__)
    plan = json.loads((folder / PLAN).read_text())
    scoring = Scoring(**plan["scoring"])
    row = plan["scoring"] | origin(plan["command"]) | measure(scoring)
    if dist.get_rank() == 0:
        with (folder / RESULTS).open("a") as results:
            results.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


def measure(scoring: Scoring) -> dict[str, Any]:
    """Milliseconds of each round, of the slowest rank, and peaks, of the fullest."""
    model = build_model(Configuration(model=scoring.model, stage=2, method="full", liger=scoring.liger))
    rows = rows_of(scoring, model.config.vocab_size)
    own = batches_of(rows[dist.get_rank() :: scoring.ranks], scoring.micro_batch)
    runs: dict[str, Callable[[Sequence[Batch]], None]] = {
        "training": partial(train, model),
        "scoring": partial(score, model, scoring),
    }
    for run in runs.values():
        run(own[: scoring.warmup])
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for number in range(scoring.rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            measured[name].append(timed(partial(runs[name], own)))
    result: dict[str, Any] = {"rows": len(rows), "tokens": sum(map(len, rows)), "batches": len(own)}
    for name, rounds in measured.items():
        result[f"{name}_ms"] = [milliseconds for milliseconds, _ in rounds]
        result[f"{name}_peak_bytes"] = max(used for _, used in rounds)
    return result


def timed(run: Callable[[], None]) -> tuple[float, int]:
    """Milliseconds and peak of the slowest and the fullest rank. Every rank must call it."""
    synchronize()
    dist.barrier()
    reset_peak()
    before = moment()
    run()
    after = moment()
    synchronize()
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (elapsed(before, after), peak()))
    times, peaks = zip(*outcomes, strict=True)
    return max(times), max(peaks)


def train(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Forward and backward of all weights, on this rank alone."""
    for batch in batches:
        model(**batch).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None


def score(model: PreTrainedModel, scoring: Scoring, batches: Sequence[Batch]) -> None:
    """Choose elements by these batches of all ranks."""
    agsel.choose_elements(model, batches, method=scoring.method, density=scoring.density)


def rows_of(scoring: Scoring, vocabulary: int) -> list[list[int]]:
    """Token ids of all ranks' rows."""
    if scoring.dataset is None:
        generator = np.random.default_rng(0)
        lengths = generator.lognormal(*LOG_LENGTH, scoring.rows).round().astype(int)
        return [generator.integers(vocabulary, size=length).tolist() for length in lengths]
    tokenizer = AutoTokenizer.from_pretrained(scoring.tokenizer)
    with Path(scoring.dataset).open() as file:
        rows = [json.loads(line) for line in islice(file, scoring.rows)]
    return [tokenizer(f"{row['question']}\n{row['answer']}{tokenizer.eos_token}").input_ids for row in rows]


def batches_of(rows: Sequence[Sequence[int]], micro_batch: int) -> list[Batch]:
    """In the order of the rows, padded to the longest of a batch."""
    return [_padded(rows[start : start + micro_batch]) for start in range(0, len(rows), micro_batch)]


def _padded(rows: Sequence[Sequence[int]]) -> Batch:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device())
    there = torch.tensor([[1] * len(row) + [0] * (ids.shape[1] - len(row)) for row in rows], device=device())
    return {"input_ids": ids, "attention_mask": there, "labels": ids.where(there == 1, UNTRAINED)}


if __name__ == "__main__":
    main()
