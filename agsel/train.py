"""Fine-tune a language model, updating only a few of its blocks at each step: what `launch/train.py` runs.

deepspeed --num_gpus 4 --module agsel.train --config qwen2.5-0.5b-gsm8k --method adagradselect

Settings: defaults, then the YAML file, then the command line (`--help`). The run folder `--output_dir` receives
`config.yaml`, `checkpoint-N/`, `tensorboard/`, `selection.json`, the trained `model/`, `result.json` and `report.html`.
"""

import agsel.commands  # before what it looks for

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedTokenizerBase
from trl import get_quantization_config

import agsel
from agsel.data.fields import Fields
from agsel.errors import UserError, complaints_of_libraries, one_line, said_of
from agsel.report import REPORT, write_report
from agsel.runs import checkpoints, folder, resume
from agsel.runs.beginning import Beginning
from agsel.runs.claim import claimed
from agsel.runs.outliving import outliving_output
from agsel.runs.preemption import SignalWatch, StopRequests, exit_code_of_stop, host_group
from agsel.runs.rank_log import LOG
from agsel.runs.ranks import ends_in_one_line, join_ranks, limit_waiting, warn_on_one_rank
from agsel.runs.trainer import saved_step
from agsel.runs.turns import in_turns
from agsel.runs.watchdog import watched_ranks
from agsel.training import train_blocks
from agsel.training.attachment import require_supported_trainer
from agsel.training.card import Run, write_card, write_guide
from agsel.training.chosen_elements import describe_elements, train_elements
from agsel.training.configuration import Configuration, configure, write_configuration
from agsel.training.cost import CostCallback, describe_result, keep_known_cost, write_result
from agsel.training.data import EVALUATION, RunData, load_data, require_data, require_labels
from agsel.training.environment import describe_environment, write_environment
from agsel.training.export import export_model, prepare_export
from agsel.training.fit import plan_of_run, require_room_for_choosing
from agsel.training.generation import require_generation_config
from agsel.training.hub import push_model, require_hub
from agsel.training.identity import describe_settings, describe_trainer
from agsel.training.judging import TaskJudge
from agsel.training.lora import adapter_of, require_taking_part
from agsel.training.merging import merge_adapter
from agsel.training.model import init_kwargs, known_init_kwargs, require_model
from agsel.training.output import curves_of, on_first_rank
from agsel.training.packages import require_packages
from agsel.training.record import Record
from agsel.training.room import require_room_for_run
from agsel.training.row_trainer import RowTrainer, choose_learning
from agsel.training.settings import read_settings
from agsel.training.summary import count_steps, describe_run, require_step
from agsel.training.tokenizer import (
    load_tokenizer,
    require_chat_template,
    require_known_positions,
    require_known_tokens,
    require_plain_head,
    require_tokenizer,
)
from agsel.zero.communication import start_deepspeed
from agsel.zero.consensus import every_rank_does, first_rank_does, require_equal_settings


def main(arguments: Sequence[str]) -> RowTrainer:
    """Train as the command line says, to the end, where the model is exported, or until asked to stop."""
    signals = SignalWatch()
    with LOG, outliving_output(signals.note, LOG.write), Beginning(signals) as beginning:
        with ends_in_one_line():
            settings = read_settings(arguments, default_settings())
            require_data(settings.values, settings.group(Fields))
            join_ranks(settings.values["rank_timeout"], settings.values["ddp_timeout"])
            beginning.ranks_have_met()
            configuration = configure(settings)
            warn_on_one_rank()
        with watched_ranks(configuration.safety.rank_timeout), ends_in_one_line():
            start_deepspeed()
            return train(configuration, beginning)


def train(configuration: Configuration, beginning: Beginning) -> RowTrainer:
    """Train and export as configured, on every rank, in a run folder that no other run uses."""
    require_equal_settings(configuration.resolved)
    group = host_group()
    limit_waiting(configuration.training.ddp_timeout)
    say_ignored(configuration)
    with claimed(Path(configuration.training.output_dir), group) as claim:
        beginning.has_folder(claim)
        every_rank_does(partial(LOG.open, Path(configuration.training.output_dir)), group)
        return train_in_folder(configuration, beginning, group)


def train_in_folder(configuration: Configuration, beginning: Beginning, group: Any) -> RowTrainer:
    """Train and export as configured, in a folder that is there."""
    run_folder = Path(configuration.training.output_dir)
    checkpoint = find_checkpoint(configuration, group)
    data = load(configuration)
    refuse_other_run(configuration, data, checkpoint)

    trainer = build_trainer(configuration, data, group)
    policy, plan = plan_run(trainer, configuration, checkpoint)

    def attach(engine: Any) -> agsel.Selection:
        return agsel.attach(
            engine,
            policy,
            offload_states=configuration.selection.offload_states,
            pin_memory=configuration.selection.pin_memory,
            max_skipped_steps=configuration.safety.max_skipped_steps,
            sanity_checks=configuration.safety.sanity_checks,
            fold_adapters=configuration.selection.fold_adapters,
            choose_early=configuration.selection.choose_early,
        )

    callback = train_blocks(
        trainer, attach, blocks=configuration.taking_part, select_from=configuration.selection.select_from
    )
    callback.record = Record(run_folder, checkpoint)
    environment = first_rank_does(partial(describe_environment, trainer.args.world_size), group)
    compared = configuration.compared_settings(policy)
    show_in_tensorboard(trainer, configuration, compared, plan, environment)
    cost = CostCallback(trainer, configuration)
    trainer.add_callback(cost)
    run = prepare_resume(configuration, data, trainer, checkpoint)
    first_rank_does(partial(write_configuration, configuration), group)
    first_rank_does(partial(write_environment, environment, run_folder), group)
    if checkpoint is not None:
        said = first_rank_does(lambda: checkpoints.set_aside_later(run_folder, saved_step(checkpoint)), group)
        if said is not None:
            on_first_rank(f"aside     {said}")
    beginning.is_over(group)
    requests = StopRequests(run_folder, beginning.signals, group)
    trainer.make_resumable(requests, run, group)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.was_stopped:
        say_goodbye(trainer, requests)
    else:
        export(trainer, configuration, group)
        result = describe_result(trainer, cost, group)
        if result["exported_step"] < result["steps"]:
            on_first_rank(f"best      the model is that of step {result['exported_step']} (--load_best_model_at_end)")
        about = Run(configuration.resolved, compared, result, callback.history, callback.counts, environment)
        try:
            if configuration.output.merge_adapter:
                base = configuration.model.model_name_or_path
                merge_adapter(trainer, base, run_folder / "model", run_folder / "merged", group)
        finally:  # what the run has come to is kept even if there is no room to merge
            first_rank_does(partial(describe_in_folder, about, configuration), group)
        say_done(configuration)
        if configuration.training.push_to_hub:
            place = first_rank_does(partial(push_model, configuration.training, run_folder / "model"), group)
            on_first_rank(f"pushed    {place}")
    return trainer


def export(trainer: RowTrainer, configuration: Configuration, group: Any) -> None:
    """Write what was trained."""
    folder = Path(configuration.training.output_dir)
    export_model(trainer, folder / "model", group, describe_elements(configuration))


def describe_in_folder(run: Run, configuration: Configuration) -> None:
    """Write, on the first rank, what people and programs read of a run that has ended."""
    folder = Path(configuration.training.output_dir)
    run = replace(run, result=keep_known_cost(run.result, folder / "result.json"))
    try_to_make("the model card", partial(write_card, folder / "model", run))
    write_guide(folder, configuration.output.report)
    write_result(run.result, folder / "result.json")
    if configuration.output.report:
        try_to_make(REPORT, partial(write_report, [folder], folder / REPORT))


def default_settings() -> dict[str, Any]:
    """Where agsel's defaults differ from TRL's."""
    return {
        "deepspeed": "zero2",
        "report_to": "tensorboard",
        "use_cpu": get_accelerator().device_name() == "cpu",
        "dtype": None,  # that of training
        "assistant_only_loss": None,  # yes for datasets of messages
        "lora_dropout": 0.0,  # as in PEFT; with dropout, agsel's faster layers cannot be used
    }


def load(configuration: Configuration) -> RunData:
    """The rows of the run."""
    with in_turns():
        data = load_data(configuration.resolved, configuration.fields)
    for line in data.said:
        on_first_rank(f"data      {line}")
    return data


def build_trainer(configuration: Configuration, data: RunData, group: Any) -> RowTrainer:
    """TRL's trainer with the rows as tokens, and with the parameters that are trained."""
    training, model = configuration.training, configuration.model
    tokenizer, adapter = require_model_of_run(configuration)
    learning = choose_learning(training, data.train)
    require_chat_template(tokenizer, training, data.train, learning)
    training.model_init_kwargs = init_kwargs(model, training)
    with complaints_of_libraries(), known_init_kwargs(training):
        trainer = RowTrainer(
            model.model_name_or_path,
            args=training,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            quantization_config=get_quantization_config(model),
            peft_config=adapter,
            learning=learning,
        )
    require_labels(trainer.train_dataset, data.train, training.max_length)
    if data.held_out is not None:
        with said_of(EVALUATION):
            require_labels(trainer.eval_dataset, data.held_out, training.max_length)
    require_known_tokens(trainer)
    require_plain_head(trainer)
    require_known_positions(trainer)
    for name, report in trainer.token_reports.items():
        on_first_rank(f"tokens    {name}: {report}")
    prepare_export(trainer)
    if configuration.tasks.eval_tasks is not None:
        trainer.judge = TaskJudge(configuration.tasks, trainer.processing_class, trainer.model)
    # The Trainer estimates its arithmetic at every step, and counts all parameters anew for it.
    trainer.model.num_parameters = cache(trainer.model.num_parameters)
    if configuration.elements.elements is not None:
        require_supported_trainer(trainer)  # choosing takes long
        said = first_rank_does(partial(require_room_for_choosing, configuration, trainer), group)
        if said is not None:
            on_first_rank(said)
        train_elements(trainer, configuration, group)
    if configuration.selection.compile_layers:
        agsel.compile_layers(trainer.model)
    require_taking_part(trainer.model, configuration.blocks_of(trainer.model))
    return trainer


def require_model_of_run(configuration: Configuration) -> tuple[PreTrainedTokenizerBase, Any]:
    """Refuse, before anything is loaded, a model with which the run would fail.

    Returns:
        Its tokenizer, and PEFT's configuration of its adapters, None without.
    """
    training, model = configuration.training, configuration.model
    require_packages(model, training)
    first_rank_does(partial(require_hub, training), None)
    config = require_model(model, training)
    require_generation_config(model)
    adapter = adapter_of(model, config, configuration.blocks_of) if model.use_peft else None
    tokenizer = load_tokenizer(model, training)
    require_tokenizer(tokenizer, config, training)
    return tokenizer, adapter


def find_checkpoint(configuration: Configuration, group: Any) -> Path | None:
    """The checkpoint to resume from, verified, and said."""
    run_folder, wanted = Path(configuration.training.output_dir), configuration.training.resume_from_checkpoint
    found = folder.prepare(run_folder, wanted, folder.outputs_of(configuration.resolved), group)
    if found is not None:
        on_first_rank(f"resume    {found}, every file verified")
    elif wanted is not None:
        on_first_rank(f"resume    {run_folder} holds no complete checkpoint: from the beginning")
    return found


def refuse_other_run(configuration: Configuration, data: RunData, checkpoint: Path | None) -> None:
    """Refuse to resume what settings and rows tell to be another run, before anything long is done."""
    if checkpoint is not None:
        resume.compare(checkpoints.Manifest.read(checkpoint).run, describe_settings(configuration, data.train))


def prepare_resume(
    configuration: Configuration, data: RunData, trainer: RowTrainer, checkpoint: Path | None
) -> dict[str, Any]:
    """What the run is like, after refusing or saying what differs from the run that saved the checkpoint."""
    run = describe_settings(configuration, data.train) | describe_trainer(trainer, data.train)
    if checkpoint is not None:
        for sentence in resume.compare(checkpoints.Manifest.read(checkpoint).run, run):
            on_first_rank(f"changed   {sentence}")
    return run


def plan_run(trainer: RowTrainer, configuration: Configuration, checkpoint: Path | None) -> tuple[agsel.Policy, str]:
    """The policy of the run and its plan, after saying what will happen and refusing what cannot fit."""
    steps = count_steps(trainer)
    require_step(trainer, steps)
    if checkpoint is not None:
        resume.require_steps_left(saved_step(checkpoint), steps.total)
    policy = configuration.build_policy()
    policy.complete(steps.per_epoch, steps.total)
    description = describe_run(configuration, trainer, policy, steps)
    on_first_rank(description)
    first_rank_does(partial(require_room_for_run, configuration, trainer, steps), None)
    return policy, f"{description}\n{check_memory(trainer, configuration, policy)}"


def check_memory(trainer: RowTrainer, configuration: Configuration, policy: agsel.Policy) -> str:
    """Say what memory the run needs, and refuse what cannot fit, on all ranks."""
    text, lacking = first_rank_does(partial(plan_of_run, configuration, trainer, policy), None)
    on_first_rank(text)
    if lacking and not configuration.selection.force:
        raise UserError(f"{lacking}; --force true starts all the same")
    if lacking:
        on_first_rank(f"warning   {lacking}")
    return text


def show_in_tensorboard(
    trainer: RowTrainer,
    configuration: Configuration,
    compared: dict[str, Any],
    plan: str,
    environment: dict[str, Any],
) -> None:
    """The run's curves go into its folder, unless TENSORBOARD_LOGGING_DIR is set, with its settings beside them."""
    curves = curves_of(trainer)
    if curves is None:
        return
    curves.logging_dir = curves.logging_dir or str(Path(configuration.training.output_dir, "tensorboard"))
    curves.settings = compared
    curves.texts = {
        "plan": plan,
        "configuration": yaml.safe_dump(configuration.resolved, sort_keys=False),
        "environment": yaml.safe_dump(environment, sort_keys=False),
    }


def say_ignored(configuration: Configuration) -> None:
    """Name what the file of `--config` sets for other methods than that of the run."""
    if configuration.ignored:
        listed = ", ".join(f"{name} {value}" for name, value in configuration.ignored.items())
        on_first_rank(f"ignored   {configuration.selection.method} does not read {listed}")


def say_goodbye(trainer: RowTrainer, requests: StopRequests) -> None:
    """Leave the marker for whoever restarts the run."""
    if dist.get_rank() == 0:
        requests.mark(trainer.last_saved, trainer.state.global_step)
    resumes = trainer.args.resume_from_checkpoint in resume.NEWEST
    on_first_rank(
        f"stopped   {requests.agreed} after step {trainer.state.global_step}; go on with the same command"
        f"{'' if resumes else ' and --resume_from_checkpoint auto'}"
    )


def try_to_make(what: str, make: Callable[[], None]) -> None:
    """The run is complete without it: whatever goes wrong is said, and ends nothing."""
    try:
        make()
    except Exception as error:
        on_first_rank(f"warning   {what} is not made: {type(error).__name__}: {one_line(error)}")


def say_done(configuration: Configuration) -> None:
    """Name what the run folder holds now."""
    run_folder = Path(configuration.training.output_dir)
    shown = ["tensorboard/"] if "tensorboard" in configuration.training.report_to else []
    written = [*folder.outputs_of(configuration.resolved), *shown, "selection.json", "result.json", "config.yaml"]
    on_first_rank(f"done      {run_folder}: {', '.join(name for name in written if (run_folder / name).exists())}")


def command() -> None:
    """What a launcher starts on every rank."""
    gc.freeze()  # what is imported stays, and every collection, as DeepSpeed's own, would look at it
    gc.enable()  # launch/train.py imports without
    trainer = main(sys.argv[1:])
    code = exit_code_of_stop() if trainer.was_stopped else 0
    if code != 0:
        dist.barrier()  # a launcher may end the other ranks when it sees this code
    dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    command()
