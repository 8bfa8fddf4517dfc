"""What runs on the ranks of tools/bench.py: every configuration of a plan, one after another, in one process.

deepspeed --num_gpus 2 tools/bench_ranks.py FOLDER

FOLDER/plan.json says what to measure; FOLDER/rows.jsonl receives one line per configuration.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import shutil
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from bench import REPOSITORY, Configuration
from bench_methods import METHODS, build_model, restored_modules
from bench_probe import Measurement, Probe, Settings, device, host_link_bandwidth, on_cuda, synchronize
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._dynamo.utils import counters
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from agsel.errors import UserError
from agsel.runs.ranks import join_ranks

PACKAGES = ("torch", "deepspeed", "transformers")
CYCLED_BATCHES = 4
SPARE_STEPS = 50
"""Of rows and steps for the trainer, which the probe stops: compiled layers need a longer warm-up."""


def main() -> None:
    """Measure every configuration of the plan; one that fails becomes a row that says why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int)
    folder = parser.parse_args().folder
    join_ranks()
    if on_cuda():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if on_cuda() else "gloo", auto_mpi_discovery=False, verbose=False)
    plan = json.loads((folder / "plan.json").read_text())
    source = origin(plan["command"])
    for index, fields in enumerate(plan["configurations"]):
        configuration = Configuration(**fields)
        outcome = attempt(configuration, Settings(plan["steps"], plan["warmup"], plan["profile"], folder))
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome)
        if dist.get_rank() == 0:
            row = asdict(configuration) | source | merge(outcomes, configuration)
            with (folder / "rows.jsonl").open("a") as rows:
                rows.write(json.dumps(row) + "\n")
            result = row["error"] or f"{row['ms_per_step']:.1f} ms/step, peak {row['peak_bytes'] / 1e9:.2f} GB"
            number = f"{index + 1}/{len(plan['configurations'])}"
            print(f"bench: {number} {configuration.setting}, {configuration.label}: {result}", flush=True)
    dist.destroy_process_group()


SUMMED = ("pinned_bytes",)
"""What ranks of one host add up; of everything else the row holds the largest."""


def attempt(configuration: Configuration, settings: Settings) -> Measurement | str:
    """The measurement, or one line about the error that prevented it. Frees everything in between."""
    try:
        run = run_trainer if configuration.method == "trainer" else run_engine
        with restored_modules(configuration):
            return run(configuration, settings)
    except (Exception, SystemExit) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    finally:
        free()


def free() -> None:
    """Give back what the last configuration held, so that the next one starts like the first."""
    unset_hf_deepspeed_config()
    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    if on_cuda():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()


def merge(outcomes: list[Measurement | str], configuration: Configuration) -> dict[str, Any]:
    """The part of a row that was measured: the slowest and fullest rank's, or the first error."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if errors:
        return {"error": errors[0]}
    ranks = [asdict(outcome) for outcome in outcomes if isinstance(outcome, Measurement)]
    row: dict[str, Any] = {"error": None}
    for name, value in ranks[0].items():
        of_ranks = [rank[name] for rank in ranks]
        row[name] = None if value is None else sum(of_ranks) if name in SUMMED else max(of_ranks)
    tokens = configuration.micro_batch * configuration.sequence * configuration.accumulation
    return row | {"tokens_per_second": 1000 * tokens / row["ms_per_step"]}


def origin(command: str) -> dict[str, Any]:
    """Where and when a row was measured, and how fast the slowest rank's link to host memory was."""
    to_device, to_host = host_link_bandwidth()
    return {
        "to_device_bytes_per_second": to_device,
        "to_host_bytes_per_second": to_host,
        "device": f"{dist.get_world_size()} x {torch.cuda.get_device_name() if on_cuda() else 'CPU'}",
        "versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
        "date": str(date.today()),
        "command": command,
    }


def run_engine(configuration: Configuration, settings: Settings) -> Measurement:
    """Measure the bare loop over a DeepSpeed engine."""
    probe = Probe(configuration, settings)
    model = build_model(configuration)
    engine, selection = METHODS[configuration.method](model, configuration)
    try:
        probe.begin(model, selection)
        batches = random_batches(configuration, model.config.vocab_size)
        number = 0
        while not probe.finished:
            for _ in range(configuration.accumulation):
                ids = batches[number % len(batches)]
                loss = engine(input_ids=ids, labels=ids).loss
                probe.mark("forward")
                engine.backward(loss)
                probe.mark("backward")
                engine.step()
                probe.mark("step")
                number += 1
            probe.end_of_step()
        if not loss.isfinite():
            raise UserError("the loss is not finite in the end: what was measured is no training")
    finally:
        dismantle(engine)
    assert probe.measurement is not None
    return probe.measurement


def dismantle(engine: Any) -> None:
    """Drop all that an engine holds: hooks tie it into cycles through C++, which the garbage collector cannot see."""
    synchronize()
    model, optimizer, selection = engine.module, engine.optimizer, getattr(engine, "selection", None)
    engine.destroy()
    parameters = list(model.parameters())
    owners = [engine, optimizer, *model.modules(), *parameters]
    for owner in owners + ([selection.residency, selection] if selection else []):
        vars(owner).clear()
    for parameter in parameters:
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def random_batches(configuration: Configuration, vocabulary: int) -> list[torch.Tensor]:
    """Token ids of this rank: int64 [micro_batch, sequence] each."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    shape = (configuration.micro_batch, configuration.sequence)
    return [torch.randint(vocabulary, shape, generator=generator).to(device()) for _ in range(CYCLED_BATCHES)]


def run_trainer(configuration: Configuration, settings: Settings) -> Measurement:
    """Measure `exploit` through launch/train.py, called in this process, on rows of exactly the sequence length."""
    folder = settings.folder / "trainer"
    steps = settings.warmup + settings.steps + SPARE_STEPS
    if dist.get_rank() == 0:
        rows = steps * configuration.micro_batch * configuration.accumulation * dist.get_world_size()
        save_inputs(configuration, folder, rows)
        gc.collect()
    dist.barrier()
    probe = Probe(configuration, settings)
    trainers: list[Any] = []
    try:
        train = load_train_script()
        build = train.build_trainer
        train.build_trainer = lambda settings: watched(build(settings), probe, trainers)
        train.export_model = lambda *_: None
        train.main(trainer_command(configuration, folder, steps))
    finally:
        for trainer in trainers:
            dismantle(trainer.deepspeed)
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    assert probe.measurement is not None
    return probe.measurement


def trainer_command(configuration: Configuration, folder: Path, steps: int) -> list[str]:
    """What to type for launch/train.py. TRL has a chunked loss of its own in place of Liger's."""
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
        "deepspeed": REPOSITORY / "ds_configs" / f"zero{configuration.stage}.json",
        "method": "adagradselect",
        "explore_steps": 0,
        "dirichlet_delta": 1e6,
        "select_fraction": configuration.fraction,
        "offload_states": configuration.offload_states,
        "compile_layers": configuration.compile,
        "use_liger_kernel": configuration.liger == "all",
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def load_train_script() -> Any:
    """A fresh copy of launch/train.py."""
    spec = importlib.util.spec_from_file_location("train", REPOSITORY / "launch" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def watched(trainer: Any, probe: Probe, trainers: list[Any]) -> Any:
    """The trainer with a callback that reports the ends of its steps to the probe; noted in the list."""

    class StepBorders(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            probe.begin(trainer.model, trainer.deepspeed.selection)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            probe.mark("all")
            probe.end_of_step()
            control.should_training_stop = probe.finished

    trainer.add_callback(StepBorders())
    trainers.append(trainer)
    return trainer


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


if __name__ == "__main__":
    main()
