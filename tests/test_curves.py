"""What TensorBoard gets beside a run, in somebody's own Trainer too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from agsel.monitor import SelectionHistory
from agsel.training.callback import SelectionCallback
from agsel.training.curves import Curves
from agsel.training.output import curves_of, direct_output
from tests.test_export import files_up_to

ON_FIRST_RANK = TrainerState(is_world_process_zero=True)


def curves_in(folder: Path) -> Curves:
    curves = Curves(lambda: SelectionHistory(("a",)))
    curves.logging_dir = str(folder)
    return curves


def events_in(folder: Path) -> Any:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_an_evaluation_without_training_is_written(tmp_path: Path) -> None:
    curves, arguments = curves_in(tmp_path), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    elsewhere = TrainerState(is_world_process_zero=False)
    curves.on_log(arguments, elsewhere, TrainerControl(), logs={"eval_loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    curves.on_log(arguments, ON_FIRST_RANK, TrainerControl(), logs={"eval_loss": 2.5})
    assert [event.value for event in events_in(tmp_path).Scalars("eval/loss")] == [2.5]


def test_settings_stand_beside_losses_and_accuracies(tmp_path: Path) -> None:
    curves, arguments = curves_in(tmp_path), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    curves.settings = {"seed": 3, "method": "lisa", "elements": None}
    numbers = {"loss": 1.0, "eval_gsm8k_accuracy": 0.5, "eval_runtime": 1.0, "speed/mfu": 0.4}
    curves.on_log(arguments, ON_FIRST_RANK, TrainerControl(), logs=numbers)
    curves.on_train_end(arguments, ON_FIRST_RANK, TrainerControl())
    metadata = events_in(tmp_path).SummaryMetadata("_hparams_/experiment")
    experiment = HParamsPluginData.FromString(metadata.plugin_data.content).experiment
    assert {metric.name.tag for metric in experiment.metric_infos} == {"train/loss", "eval/gsm8k_accuracy"}
    assert {setting.name for setting in experiment.hparam_infos} == {"seed", "method", "elements"}


def test_norms_are_of_every_step_whatever_is_logged(tmp_path: Path) -> None:
    """And not once more of those before a resume."""
    history = SelectionHistory(("a", "b"))
    history.add(1, "explore", ["a"], {"a": 1.0, "b": 2.0})
    curves, arguments = Curves(lambda: history), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    curves.logging_dir = str(tmp_path)
    curves.on_train_begin(arguments, ON_FIRST_RANK, TrainerControl())
    history.add(2, "explore", ["b"], {"a": 3.0, "b": 4.0})
    history.add(3, "exploit", ["b"], {"b": 5.0})
    history.add(4, "skipped", [], {"a": math.inf, "b": 6.0})
    state = TrainerState(is_world_process_zero=True, global_step=4)
    curves.on_log(arguments, state, TrainerControl(), logs={"loss": 1.0, "block_norm/b": 6.0})
    history.add(5, "exploit", ["a"], {"a": 7.0})
    state.global_step = 5
    curves.on_log(arguments, state, TrainerControl(), logs={"loss": 1.0})
    found = {name: [(e.step, e.value) for e in events_in(tmp_path).Scalars(f"block_norm/{name}")] for name in "ab"}
    assert found == {"a": [(2, 3), (5, 7)], "b": [(2, 4), (3, 5), (4, 6)]}


def test_steps_that_are_done_again_are_shown_once(tmp_path: Path) -> None:
    """Those that a process did after its last checkpoint, before it was killed."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for saved, losses in ((0, (9.0, 8.0, 7.0, 6.0)), (2, (5.0, 4.0))):
        curves, state = curves_in(tmp_path), TrainerState(is_world_process_zero=True, global_step=saved)
        curves.on_train_begin(arguments, state, TrainerControl())
        for loss in losses:
            state.global_step += 1
            curves.on_log(arguments, state, TrainerControl(), logs={"loss": loss})
        assert curves.tb_writer is not None
        curves.tb_writer.close()
    found = [(event.step, event.value) for event in events_in(tmp_path).Scalars("train/loss")]
    assert found == [(1, 9), (2, 8), (3, 5), (4, 4)]


def test_no_run_ends_as_its_curves_find_no_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    curves, arguments = curves_in(tmp_path), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = TrainerState(is_world_process_zero=True)
    curves.on_train_begin(arguments, state, TrainerControl())
    with files_up_to(20_000):
        for state.global_step in range(1, 2000):
            curves.on_log(arguments, state, TrainerControl(), logs={"loss": 1.0, "grad_norm": 2.0})
        assert curves.tb_writer is None
    curves.on_log(arguments, state, TrainerControl(), logs={"loss": 1.0})
    curves.on_train_end(arguments, state, TrainerControl())
    [message] = caplog.messages
    assert message.startswith("no more curves for TensorBoard: ")
    assert events_in(tmp_path).Scalars("train/loss")[0].value == 1


def test_only_the_callback_of_the_trainer_itself_is_replaced(tmp_path: Path) -> None:
    class Own(TensorBoardCallback):  # type: ignore[misc]
        pass

    for theirs, becomes in ((TensorBoardCallback(), Curves), (Own(), Own)):
        trainer: Any = Trainer([theirs])
        first = SelectionCallback(trainer)
        direct_output(trainer, first)
        kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert kinds == [SelectionCallback, becomes]
        assert (curves_of(trainer) is not None) == (becomes is Curves)


class Trainer:
    """As far as callbacks are concerned."""

    def __init__(self, callbacks: list[Any]) -> None:
        self.callback_handler = CallbackHandler(callbacks, None, None, None, None)
        self.callback_handler.callbacks = callbacks
        self.pop_callback = self.callback_handler.pop_callback
        self.remove_callback = self.callback_handler.remove_callback
        self.add_callback = self.callback_handler.add_callback
