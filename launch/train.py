"""Fine-tune a language model, updating only a few of its blocks at each step.

deepspeed --num_gpus 4 launch/train.py --config launch/recipes/qwen2.5-0.5b-gsm8k.yaml --method adagradselect

Settings: defaults, then the YAML file, then the command line (`python launch/train.py --help`). The run folder
`--output_dir` receives `config.yaml`, `checkpoint-N/`, `tensorboard/`, `selection.json` and the trained `model/`.
"""

import os
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from datasets import Dataset
from deepspeed.accelerator import get_accelerator
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import TensorBoardCallback
from trl import get_peft_config, get_quantization_config

import agsel
from agsel.runs import checkpoints, resume
from agsel.runs.preemption import SignalWatch, StopRequests, host_group
from agsel.runs.ranks import join_ranks, limit_waiting, mistakes_in_one_line, warn_on_one_rank
from agsel.runs.trainer import ResumableTrainer
from agsel.runs.watchdog import watched_ranks
from agsel.training import add_selection, build_policy
from agsel.training.configuration import Configuration, parse_configuration, write_configuration
from agsel.training.data import load_rows, require_labels, to_training_format
from agsel.training.export import export_model
from agsel.training.fit import plan_of_run
from agsel.training.identity import describe_for_resume
from agsel.training.model import require_chat_template, require_model
from agsel.training.summary import count_steps, describe_run
from agsel.zero.consensus import first_rank_does, require_equal_settings

DEFAULT_DEEPSPEED = Path(__file__).parents[1] / "ds_configs" / "zero2.json"


def main(arguments: list[str]) -> ResumableTrainer:
    """Train as the command line says, to the end, where the model is exported, or until asked to stop."""
    signals = SignalWatch()
    with mistakes_in_one_line():
        join_ranks()
        configuration = parse_configuration(arguments, default_settings())
        # On the CPU TrainingArguments starts torch.distributed only, but ZeRO-3 asks DeepSpeed for the number of ranks.
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        warn_on_one_rank()
    with watched_ranks(configuration.safety.rank_timeout):
        return train(configuration, signals)


def train(configuration: Configuration, signals: SignalWatch) -> ResumableTrainer:
    """Train and export as configured, on every rank."""
    with mistakes_in_one_line():
        require_equal_settings(configuration.resolved)
        group = host_group()
        limit_waiting(configuration.training.ddp_timeout)
        checkpoint = find_checkpoint(configuration, group)
        trainer = build_trainer(configuration)
        run = prepare_resume(configuration, trainer, checkpoint)
        first_rank_does(partial(write_configuration, configuration), group)
        requests = StopRequests(Path(configuration.training.output_dir), signals, group)
        trainer.make_resumable(requests, run, group)
    with mistakes_in_one_line(only_of_agsel=True):
        trainer.train(resume_from_checkpoint=checkpoint)
    if requests.agreed:
        say_goodbye(trainer, requests)
    else:
        with mistakes_in_one_line(only_of_agsel=True):
            export_model(trainer, Path(configuration.training.output_dir, "model"), group)
        shown = ["tensorboard/"] if "tensorboard" in configuration.training.report_to else []
        written = ", ".join(["model/", *shown, "selection.json", "config.yaml"])
        on_first_rank(f"done      {configuration.training.output_dir}: {written}")
    return trainer


def default_settings() -> dict[str, Any]:
    """Where agsel's defaults differ from TRL's."""
    return {
        "deepspeed": str(DEFAULT_DEEPSPEED),
        "report_to": "tensorboard",
        "use_cpu": get_accelerator().device_name() == "cpu",
        "dtype": None,  # that of training
        "assistant_only_loss": None,  # yes for datasets of messages
    }


def build_trainer(configuration: Configuration) -> ResumableTrainer:
    """TRL's trainer with the dataset mapped and checked, and with block selection added."""
    training, model = configuration.training, configuration.model
    require_model(model, training)
    rows = load(configuration, configuration.script.dataset_train_split)
    held_out = None
    if training.eval_strategy != "no":
        held_out = load(configuration, configuration.script.dataset_test_split)
    if training.assistant_only_loss is None:
        training.assistant_only_loss = "messages" in rows.column_names
    training.model_init_kwargs = (training.model_init_kwargs or {}) | {
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
    }
    require_chat_template(model, training, rows)
    trainer = ResumableTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=rows,
        eval_dataset=held_out,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    require_labels(trainer.train_dataset, len(rows), training.max_length)
    if held_out is not None:
        require_labels(trainer.eval_dataset, len(held_out), training.max_length)
    # The Trainer estimates its arithmetic at every step, and counts all parameters anew for it.
    trainer.model.num_parameters = cache(trainer.model.num_parameters)
    if configuration.selection.compile_layers:
        agsel.compile_layers(trainer.model)
    direct_output(trainer)
    add_policy(trainer, configuration)
    return trainer


def find_checkpoint(configuration: Configuration, group: Any) -> str | None:
    """The checkpoint to resume from, verified, and said."""
    training = configuration.training
    run_folder = Path(training.output_dir)
    first_rank_does(partial(make_run_folder, run_folder), group)
    first_rank_does(partial(checkpoints.recover, run_folder), group)
    if training.resume_from_checkpoint is None:
        first_rank_does(partial(require_no_earlier_run, run_folder), group)
    found = resume.find_checkpoint(training.resume_from_checkpoint, run_folder, group)
    if found is not None:
        on_first_rank(f"resume    {found}, every file verified")
    elif training.resume_from_checkpoint is not None:
        on_first_rank(f"resume    {run_folder} holds no complete checkpoint: from the beginning")
    return str(found) if found else None


def make_run_folder(run_folder: Path) -> None:
    """Refuse a folder that cannot be written before anything is loaded."""
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the run folder (--output_dir), {error}: choose another") from error
    if not os.access(run_folder, os.W_OK):
        raise ValueError(f"cannot write to the run folder {run_folder} (--output_dir): choose another")


def require_no_earlier_run(run_folder: Path) -> None:
    """Refuse a new run in the folder of another: it would resume from its checkpoints, delete them or its model."""
    earlier = checkpoints.checkpoints_in(run_folder)
    if earlier:
        raise ValueError(
            f"{run_folder} (--output_dir) holds {earlier[-1].name} of an earlier run: go on with that "
            "(--resume_from_checkpoint auto), or choose another folder"
        )
    if (run_folder / "model").exists():
        raise ValueError(
            f"{run_folder} (--output_dir) holds the model of an earlier run: choose another folder, or move model/ away"
        )


def prepare_resume(configuration: Configuration, trainer: ResumableTrainer, checkpoint: str | None) -> dict[str, Any]:
    """What the run is like, after refusing or saying what differs from the run that saved the checkpoint."""
    run = describe_for_resume(configuration, trainer)
    if checkpoint is not None:
        for sentence in resume.compare(checkpoints.Manifest.read(Path(checkpoint)).run, run):
            on_first_rank(f"changed   {sentence}")
    return run


def say_goodbye(trainer: ResumableTrainer, requests: StopRequests) -> None:
    """Leave the marker for whoever restarts the run."""
    if dist.get_rank() == 0:
        requests.mark(trainer.last_saved, trainer.state.global_step)
    on_first_rank(
        f"stopped   {requests.agreed} after step {trainer.state.global_step}; go on with the same command and "
        "--resume_from_checkpoint auto"
    )


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar without its lines of numbers: agsel's status line says that in words."""

    def on_log(self, *arguments: Any, **options: Any) -> None:
        """Write nothing."""


def direct_output(trainer: ResumableTrainer) -> None:
    """Status line, progress bar on a terminal, TensorBoard in the run folder unless TENSORBOARD_LOGGING_DIR is set."""
    trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)
    if sys.stderr.isatty() and not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressBar)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(trainer.args.output_dir, "tensorboard"))


def load(configuration: Configuration, split: str) -> Dataset:
    """One split of the dataset, as prompt and completion or messages; the first rank fills the cache."""
    with configuration.training.main_process_first(desc="dataset"):
        rows = load_rows(configuration.script.dataset_name, split, configuration.script.dataset_config)
        return to_training_format(rows, configuration.data)


def add_policy(trainer: ResumableTrainer, configuration: Configuration) -> None:
    """Add block selection to the trainer, and say what will happen."""
    settings = configuration.selection
    steps = count_steps(trainer)
    policy = build_policy(settings, explore_steps=steps.of_first_epoch, seed=configuration.training.seed)
    add_selection(
        trainer,
        policy,
        blocks=settings.taking_part,
        offload_states=settings.offload_states,
        pin_memory=settings.pin_memory,
        max_skipped_steps=configuration.safety.max_skipped_steps,
        sanity_checks=configuration.safety.sanity_checks,
    )
    on_first_rank(describe_run(configuration, trainer, policy, steps))
    check_memory(trainer, configuration, policy)


def check_memory(trainer: ResumableTrainer, configuration: Configuration, policy: agsel.Policy) -> None:
    """Say what memory the run needs, and refuse what cannot fit, on all ranks."""
    text, lacking = first_rank_does(partial(plan_of_run, configuration, trainer, policy), None)
    on_first_rank(text)
    if lacking and not configuration.selection.force:
        raise ValueError(f"{lacking}; --force true starts all the same")
    if lacking:
        on_first_rank(f"warning   {lacking}")


def on_first_rank(text: str) -> None:
    """Print from one rank only, in one piece: others may log at the same time."""
    if dist.get_rank() == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
    dist.destroy_process_group()
