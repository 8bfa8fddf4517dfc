"""Named cases that run on the ranks of one launch; what each returned, failed with, or why it cannot run here.

A case that fails ends its launch, and the cases after it get another one: its own tests fail, nobody else's.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from tests.distributed import RANKS, start_ranks

NAMES = "cases.json"
"""File by which a launch tells which cases it began with."""


class CannotRun(Exception):  # noqa: N818
    """The accelerator lacks something that a case needs; its message is the reason of the skip."""


@dataclass(frozen=True)
class Skipped:
    """In place of the result of a case that cannot run."""

    reason: str

    def judge(self, name: str) -> NoReturn:
        pytest.skip(f"{name}: {self.reason}")


@dataclass(frozen=True)
class Failed:
    """In place of the result of a case that raised an error, or in which a rank died or never came to an end."""

    story: str

    def judge(self, name: str) -> NoReturn:
        pytest.fail(f"case {name} failed on the ranks:\n{self.story}", pytrace=False)


class Results(dict[str, Any]):
    """Results of one rank by case. Asking for one that failed fails the test that asks, likewise for a skip."""

    def __getitem__(self, name: str) -> Any:
        result = super().__getitem__(name)
        if isinstance(result, Skipped | Failed):
            result.judge(name)
        return result

    def __or__(self, other: Any) -> Results:
        return Results(super().__or__(other))


def require_dtype(dtype: str) -> None:
    """Skip the case if DeepSpeed does not train in this type here: some processors have no fp16.

    Raises:
        CannotRun: so it is.
    """
    if dtype == "fp16" and not get_accelerator().is_fp16_supported():
        raise CannotRun(f"{get_accelerator().device_name()} has no fp16 here (get_accelerator().is_fp16_supported())")


def run_cases(cases: dict[str, Callable[[], Any]]) -> None:
    """Entry point of a rank script: run the cases named on the command line (all by default) and save the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=list(cases))
    arguments = parser.parse_args()
    on_gpu = get_accelerator().device_name() == "cuda"
    if on_gpu:
        torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo")
    rank = torch.distributed.get_rank()
    if rank == 0:
        (arguments.output / NAMES).write_text(json.dumps(arguments.cases))
    gc.freeze()  # what was imported is not searched again after every case
    for name in arguments.cases:
        start = time.perf_counter()
        result = _outcome(cases[name])
        _save(result, _file(arguments.output, name, rank))
        if isinstance(result, Failed):
            print(f"case {name} on rank {rank}: {result.story}", flush=True)
            os._exit(1)  # start_ranks.py ends the other ranks, which may be waiting for this one
        if rank == 0:
            print(f"case {name}: {time.perf_counter() - start:.1f} s", flush=True)
        gc.collect()
        gc.freeze()  # what is still there stays: it was searched after every case, and by DeepSpeed for every engine
        torch.distributed.barrier()


def _outcome(case: Callable[[], Any]) -> Any:
    try:
        return case()
    except CannotRun as error:
        return Skipped(str(error))
    except BaseException:
        return Failed(traceback.format_exc())


def launch_cases(script: str | Path, output: Path, *cases: str, ranks: int = RANKS) -> list[Results]:
    """Launch a rank script and return the results of its cases, by rank.

    Args:
        script: that calls `run_cases`.
        output: folder for the results.
        cases: names of those to run, in this order; all by default.
        ranks: to launch.
    """
    output.mkdir(parents=True, exist_ok=True)
    results = [Results() for _ in range(ranks)]
    left: Sequence[str] | None = cases or None
    while left is None or left:
        said = _launch_once(script, output, left, ranks)
        names = json.loads((output / NAMES).read_text()) if (output / NAMES).is_file() else []
        assert names, f"no case of {script} was begun: {said[-6000:]}"
        (output / NAMES).unlink()
        left = _collect(results, output, names, said)
    return results


def _launch_once(script: str | Path, output: Path, cases: Sequence[str] | None, ranks: int) -> str:
    """What the launch printed."""
    chosen = [] if cases is None else ["--cases", *cases]
    try:
        return start_ranks(script, "--output", output, *chosen, ranks=ranks).stdout
    except subprocess.TimeoutExpired as error:
        return f"{error.output}\nnot at its end after {error.timeout:g} s"


def _collect(results: list[Results], output: Path, names: Sequence[str], said: str) -> Sequence[str]:
    """Enter the outcomes of a launch. Returns the cases that it did not come to: those after one that failed."""
    for position, name in enumerate(names):
        files = [_file(output, name, rank) for rank in range(len(results))]
        outcomes = [torch.load(file, map_location="cpu", weights_only=False) for file in files if file.is_file()]
        stories = [outcome.story for outcome in outcomes if isinstance(outcome, Failed)]
        if not stories and len(outcomes) < len(results):
            stories = [said[-6000:]]
        failed = Failed("\n".join(stories)) if stories else None
        for rank, result in enumerate(results):
            result[name] = failed or outcomes[rank]
        if failed:
            return names[position + 1 :]
    return ()


def _file(output: Path, name: str, rank: int) -> Path:
    return output / f"{name}-rank{rank}.pt"


def _save(result: Any, path: Path) -> None:
    """Whole or not at all, as a rank may be killed any time."""
    incomplete = path.with_suffix(".incomplete")
    torch.save(result, incomplete)
    incomplete.rename(path)


def message_of(error: type[Exception], action: Callable[[], Any]) -> str | None:
    """The message of the error that `action` raises, None if it raises none."""
    try:
        action()
    except error as raised:
        return str(raised)
    return None


@contextmanager
def logged() -> Iterator[list[str]]:
    """What agsel's logger says inside the context."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("agsel")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
