"""A training run through launch/train.py, in this process."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

import agsel.train
from agsel.policies import Policy, flags_of
from tools.bench.bare_loop import dismantle
from tools.bench.compared_methods import method_of
from tools.bench.configurations import Configuration
from tools.bench.random_model import build_model
from tools.bench.stopwatch import Measurement, Settings, Stopwatch

SPARE_STEPS = 50
"""Of rows and steps for the trainer, which the stopwatch stops: compiled layers need a longer warm-up."""


def run_trainer(configuration: Configuration, settings: Settings) -> Measurement:
    """Measure the method through launch/train.py, called in this process, on rows of exactly the sequence length."""
    folder = settings.folder / "trainer"
    steps = settings.warmup + settings.steps + SPARE_STEPS
    with inputs(configuration, folder, steps):
        stopwatch = Stopwatch(configuration, settings)
        with watched(stopwatch):
            agsel.train.main(command(configuration, folder, steps))
    assert stopwatch.measurement is not None
    return stopwatch.measurement


@contextmanager
def inputs(configuration: Configuration, folder: Path, steps: int) -> Iterator[None]:
    """A folder with a model and rows enough for the steps, for the time being."""
    first = dist.get_rank() == 0
    if first:
        rows = steps * configuration.micro_batch * configuration.accumulation * dist.get_world_size()
        save_inputs(configuration, folder, rows)
        gc.collect()
    dist.barrier()
    try:
        yield
    finally:
        dist.barrier()
        if first:
            shutil.rmtree(folder)


def save_inputs(configuration: Configuration, folder: Path, rows: int) -> None:
    """A model folder with random weights and a tokenizer of bytes, and rows of `sequence` tokens."""
    plain = replace(configuration, liger="none", checkpointing=False, compile=False)
    build_model(plain).save_pretrained(folder / "model")
    vocabulary = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder / "model"
    )
    row = {"question": "q", "answer": "a" * (configuration.sequence - 3)}  # and a space before it, and <eos>
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * rows)


def command(configuration: Configuration, folder: Path, steps: int) -> list[str]:
    """What to type for launch/train.py. TRL has a chunked loss of its own in place of Liger's."""
    policy_of = method_of(configuration).policy
    assert policy_of is not None, "launch/train.py trains with a policy"
    values = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "run",
        "prompt_field": "question",
        "completion_field": "answer",
        "completion_template": " {answer}",
        "max_length": configuration.sequence,
        "max_steps": steps,
        "per_device_train_batch_size": configuration.micro_batch,
        "gradient_accumulation_steps": configuration.accumulation,
        "gradient_checkpointing": configuration.checkpointing,
        "bf16": True,
        "attn_implementation": "sdpa",
        "save_strategy": "no",
        "deepspeed": f"zero{configuration.stage}",
        "offload_states": configuration.offload_states,
        "select_from": configuration.select_from,
        "compile_layers": configuration.compile,
        "use_liger_kernel": configuration.liger in ("all", "trl"),
        **options_of(policy_of(configuration.fraction)),
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def options_of(policy: Policy) -> dict[str, Any]:
    """The method of a policy and its settings by their names on the command line, but for those left as they are."""
    settings = {flag: (getattr(policy, field.name), field.default) for flag, field in flags_of(type(policy)).items()}
    return {"method": policy.method} | {flag: value for flag, (value, usual) in settings.items() if value != usual}


@contextmanager
def watched(stopwatch: Stopwatch) -> Iterator[None]:
    """The trainers of launch/train.py report to the stopwatch, export nothing, and leave nothing behind."""
    build = agsel.train.build_trainer
    with ExitStack() as afterwards:
        afterwards.callback(forget_accelerate)

        def build_watched(*arguments: Any) -> Any:
            trainer = build(*arguments)
            trainer.add_callback(StepBorders(trainer, stopwatch))
            afterwards.callback(dismantle_trainer, trainer)
            return trainer

        with (
            patch.object(agsel.train, "build_trainer", build_watched),
            patch.object(agsel.train, "export", lambda *_: None),
            patch.object(agsel.train, "describe_in_folder", lambda *_: None),
        ):
            yield


def dismantle_trainer(trainer: Any) -> None:
    """Drop all that a trainer's engine holds, if it came to have one."""
    if trainer.deepspeed is not None:
        dismantle(trainer.deepspeed)


def forget_accelerate() -> None:
    """Put back what a Trainer sets for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


class StepBorders(TrainerCallback):
    """Reports the ends of a trainer's steps to a stopwatch."""

    def __init__(self, trainer: Any, stopwatch: Stopwatch) -> None:
        self._trainer, self._stopwatch = trainer, stopwatch

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The engine is there."""
        self._stopwatch.begin(self._trainer.model, self._trainer.deepspeed.selection)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step ends, and perhaps the run."""
        self._stopwatch.mark("all")
        self._stopwatch.end_of_step()
        control.should_training_stop = self._stopwatch.finished
