"""agsel inside any `transformers.Trainer` that runs under DeepSpeed, TRL's trainers included.

trainer = Trainer(model, TrainingArguments(..., deepspeed="ds_configs/zero2.json"), train_dataset=...)
add_selection(trainer, agsel.AdaGradSelect(fraction=0.3, explore_steps=500))
trainer.train()
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.training_args import OptimizerNames

import agsel
from agsel.monitor import block_ranges, selection_scalars, status_line
from agsel.policies import Policy
from agsel.zero import Selection, StepReport
from agsel.zero.guards import require_policy


def add_selection(
    trainer: Trainer,
    policy: Policy,
    *,
    blocks: Literal["layers", "all"] = "layers",
    offload_states: bool = True,
    pin_memory: bool = True,
    max_skipped_steps: int = 50,
    sanity_checks: int = 0,
) -> "SelectionCallback":
    """Make a Trainer update only the blocks that `policy` selects. Call it once, before `trainer.train()`.

    The optimizer becomes AdamW with one param group per block and the learning rate, betas, eps and weight decay of
    the trainer's arguments. Weight decay acts on all weights of a block, norms and biases included.

    Args:
        trainer: under DeepSpeed ZeRO stage 1, 2 or 3, without an optimizer of its own.
        policy: who is updated next; equal on all ranks.
        blocks: which blocks take part, as in `agsel.block_param_groups`.
        offload_states: keep the optimizer states of blocks that are not selected in host memory.
        pin_memory: page-lock that memory.
        max_skipped_steps: stop the run after this many steps in a row with a non-finite gradient.
        sanity_checks: check weights and states every so many steps, see `agsel.zero.sanity`; 0 never checks.

    Returns:
        The callback; its `selection` is set from the first moment of training.

    Raises:
        ValueError: called twice, no policy, no DeepSpeed, an optimizer in the DeepSpeed configuration, `--optim` is no
            AdamW of torch, or gradient checkpointing is reentrant.
    """
    require_policy(policy)
    _require_supported_trainer(trainer)
    trainer.args.gradient_checkpointing_kwargs = (trainer.args.gradient_checkpointing_kwargs or {}) | {
        "use_reentrant": False
    }
    adam = Trainer.get_optimizer_cls_and_kwargs(trainer.args)[1] | {"weight_decay": trainer.args.weight_decay}

    def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(agsel.block_param_groups(model, blocks), **adam)

    trainer.optimizer_cls_and_kwargs = (lambda: build_optimizer, {})
    callback = SelectionCallback(
        trainer,
        policy,
        offload_states=offload_states,
        pin_memory=pin_memory,
        max_skipped_steps=max_skipped_steps,
        sanity_checks=sanity_checks,
    )
    trainer.add_callback(callback)
    return callback


def _require_supported_trainer(trainer: Trainer) -> None:
    if any(isinstance(callback, SelectionCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("add_selection was called twice on one trainer: keep the callback it returned the first time")
    if not trainer.is_deepspeed_enabled:
        raise ValueError("agsel needs DeepSpeed: give the trainer a configuration (--deepspeed ds_configs/zero2.json)")
    if "optimizer" in trainer.accelerator.state.deepspeed_plugin.deepspeed_config:
        raise ValueError(
            "the DeepSpeed configuration (--deepspeed) has an `optimizer` section: remove it, agsel makes an AdamW "
            "with one param group per block"
        )
    if trainer.optimizer is not None:
        raise ValueError("the trainer has an optimizer already: leave it out, agsel makes an AdamW of its own")
    supported = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
    if trainer.args.optim not in supported:
        raise ValueError(
            f"agsel trains with AdamW, not with {trainer.args.optim.value} (--optim): use "
            f"{' or '.join(name.value for name in supported)}"
        )
    checkpointing = trainer.args.gradient_checkpointing_kwargs or {}
    if trainer.args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise ValueError(
            "reentrant gradient checkpointing silently leaves blocks untrained: set use_reentrant to false "
            "(--gradient_checkpointing_kwargs); TRL forces it on PEFT with ZeRO-3: there use "
            "--gradient_checkpointing false, or ZeRO-2"
        )


class SelectionCallback(TrainerCallback):
    """Attaches agsel to the trainer's engine, prints the status line, reports to TensorBoard, writes `selection.json`.

    TensorBoard scalars go where the Trainer's own go, if it has a `TensorBoardCallback`.
    """

    def __init__(self, trainer: Trainer, policy: Policy, **options: Any) -> None:
        self.selection: Selection | None = None
        self._policy = policy
        self._options = options
        self._trainer = trainer
        self._modes: list[str] = []
        self._clock = _TokenClock()
        accelerator = trainer.accelerator
        accelerator.prepare = self._attaching(accelerator.prepare)

    def _attaching(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """`Accelerator.prepare` that attaches agsel to the engine it makes.

        No callback event comes between `deepspeed.initialize` and the loading of a checkpoint, and only an engine with
        agsel attached restores the selection from it.
        """

        def prepare_and_attach(*objects: Any, **options: Any) -> Any:
            with agsel.lean_initialization():
                prepared = prepare(*objects, **options)
            if self._trainer.is_in_train and any(isinstance(item, torch.optim.Optimizer) for item in objects):
                self._attach(self._trainer.accelerator.deepspeed_engine_wrapped.engine)
            return prepared

        return prepare_and_attach

    def _attach(self, engine: Any) -> None:
        # Gradient checkpointing makes the embedding's output require a gradient, which drags the backward through
        # every frozen layer below the lowest selected one. Only reentrant checkpointing, which is refused, needs it.
        if self._trainer.args.gradient_checkpointing:
            engine.module.disable_input_require_grads()
        self.selection = agsel.attach(engine, self._policy, **self._options)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember how the step chose its blocks."""
        if state.is_world_process_zero:
            self._modes.append(self._last_step().mode)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the status line, and after training steps write the scalars."""
        numbers = dict(logs or {})
        if not state.is_world_process_zero or not numbers.keys() & {"loss", "eval_loss"}:
            return
        if "loss" not in numbers:
            tqdm.write(status_line(state.global_step, state.max_steps, numbers))
            return
        numbers |= self._clock.tokens_per_second(numbers.get("num_tokens"))
        tqdm.write(status_line(state.global_step, state.max_steps, numbers, self._choice()))
        self._write_scalars(state.global_step)
        self._modes.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write how often each block was trained to `<output_dir>/selection.json`; say what sanity checks cost."""
        if state.is_world_process_zero and self.selection is not None:
            report = self._policy.settings() | {
                "steps": self._policy.step,
                "blocks": list(self.selection.blocks),
                "counts": self.selection.counts,
            }
            Path(args.output_dir, "selection.json").write_text(json.dumps(report, indent=2) + "\n")
            if self.selection.sanity is not None:
                tqdm.write(str(self.selection.sanity))

    def _last_step(self) -> StepReport:
        assert self.selection is not None
        assert self.selection.last is not None
        return self.selection.last

    def _choice(self) -> str:
        last = self._last_step()
        epsilon = getattr(self._policy, "epsilon", None)
        mode = last.mode if epsilon is None else f"{last.mode} ε {epsilon:.2f}"
        return f"{mode}  {block_ranges(last.selected)}"

    def _write_scalars(self, step: int) -> None:
        writer = self._tensorboard_writer()
        if writer is None or self.selection is None:
            return
        last = self._last_step()
        scalars = selection_scalars(
            counts=self.selection.counts,
            selected=last.selected,
            norms=last.norms,
            explored=self._modes.count("explore") / max(1, len(self._modes)),
            epsilon=getattr(self._policy, "epsilon", None),
        )
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)

    def _tensorboard_writer(self) -> Any:
        """The writer of the Trainer's own scalars: a second one in the same folder would hide one of the two."""
        callbacks = self._trainer.callback_handler.callbacks
        return next((item.tb_writer for item in callbacks if isinstance(item, TensorBoardCallback)), None)


class _TokenClock:
    """Tokens per second between status lines, pauses for evaluation included, from the running total that TRL logs."""

    def __init__(self) -> None:
        self._time = 0.0
        self._tokens = 0.0

    def tokens_per_second(self, tokens: float | None) -> dict[str, float]:
        """Empty on the first call and for trainers that do not count tokens."""
        if tokens is None:
            return {}
        now = time.perf_counter()
        seconds, new_tokens, first = now - self._time, tokens - self._tokens, self._tokens == 0
        self._time, self._tokens = now, tokens
        return {} if first else {"tokens_per_second": new_tokens / seconds}
