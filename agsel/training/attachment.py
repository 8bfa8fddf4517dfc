"""agsel on any `transformers.Trainer` that runs under DeepSpeed, TRL's trainers included.

trainer = Trainer(model, TrainingArguments(..., deepspeed="ds_configs/zero2.json"), train_dataset=...)
add_selection(trainer, agsel.AdaGradSelect(fraction=0.3, explore_steps=500))
trainer.train()
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.training_args import OptimizerNames

import agsel
from agsel import upstream
from agsel.errors import UserError
from agsel.policies import Policy
from agsel.training.callback import SelectionCallback
from agsel.training.output import direct_output
from agsel.zero import Selection
from agsel.zero.guards import require_policy

RELIES_ON = {
    Trainer: ("_prepare_for_training", "create_optimizer"),
    deepspeed_integration: ("deepspeed_load_checkpoint",),
}
"""What makes optimizer and engine and loads checkpoints; see `_when_engine_is_made`."""

Attach = Callable[[Any], Selection]
"""Takes the engine, and calls `agsel.attach` on it."""


def add_selection(
    trainer: Trainer,
    policy: Policy,
    *,
    blocks: Literal["layers", "all"] = "layers",
    select_from: float = 0,
    offload_states: bool = True,
    pin_memory: bool = True,
    max_skipped_steps: int = 50,
    sanity_checks: int = 0,
    fold_adapters: bool = False,
    choose_early: bool = False,
) -> SelectionCallback:
    """Make a Trainer update only the blocks that `policy` selects. Call it once, before `trainer.train()`.

    Args:
        trainer: under DeepSpeed ZeRO stage 1, 2 or 3, without an optimizer of its own.
        policy: who is updated next; equal on all ranks.
        blocks: which blocks take part, as in `agsel.block_param_groups`.
        select_from: the lowest layer that does, likewise.
        offload_states: keep the optimizer states of blocks that are not selected in host memory.
        pin_memory: page-lock that memory.
        max_skipped_steps: stop the run after this many steps in a row with a non-finite gradient.
        sanity_checks: check weights and states every so many steps, see `agsel.zero.sanity`; 0 never checks.
        fold_adapters: compute with LoRA adapters added to their weights for the moment, see `agsel.low_rank`.
        choose_early: let a step that explores choose by its first micro-batch, see `agsel.attach`.

    Returns:
        The callback; its `selection` is set from the first moment of training.

    Raises:
        UserError: as of `train_blocks`, or `policy` is none.
        RunError: as of `train_blocks`.
    """
    require_policy(policy)

    def attach(engine: Any) -> Selection:
        return agsel.attach(
            engine,
            policy,
            offload_states=offload_states,
            pin_memory=pin_memory,
            max_skipped_steps=max_skipped_steps,
            sanity_checks=sanity_checks,
            fold_adapters=fold_adapters,
            choose_early=choose_early,
        )

    return train_blocks(trainer, attach, blocks=blocks, select_from=select_from)


def train_blocks(
    trainer: Trainer, attach: Attach, *, blocks: Literal["layers", "all"], select_from: float = 0
) -> SelectionCallback:
    """Give a Trainer's optimizer one param group per block, and its engine to `attach` as soon as it is made.

    The optimizer becomes AdamW with the learning rate, betas, eps and weight decay of the trainer's arguments. Weight
    decay acts on all weights of a block, norms and biases included.

    Args:
        trainer: under DeepSpeed ZeRO stage 1, 2 or 3, without an optimizer of its own.
        attach: calls `agsel.attach` on the engine that it is given.
        blocks: which blocks take part, as in `agsel.block_param_groups`.
        select_from: the lowest layer that does, likewise.

    Raises:
        UserError: called twice, no DeepSpeed, an optimizer in the DeepSpeed configuration, `--optim` is no AdamW of
            torch, or gradient checkpointing is reentrant.
        RunError: this transformers differs from the tested one where it makes the engine.
    """
    require_supported_trainer(trainer)
    upstream.require_tested(__name__)
    trainer.args.gradient_checkpointing_kwargs = (trainer.args.gradient_checkpointing_kwargs or {}) | {
        "use_reentrant": False
    }
    adam = Trainer.get_optimizer_cls_and_kwargs(trainer.args)[1] | {"weight_decay": trainer.args.weight_decay}

    def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(agsel.block_param_groups(model, blocks, select_from), **adam)

    trainer.optimizer_cls_and_kwargs = (lambda: build_optimizer, {})
    callback = SelectionCallback(trainer)

    def on_engine(engine: Any) -> None:
        # Gradient checkpointing makes the embedding's output require a gradient, which drags the backward through
        # every frozen layer below the lowest selected one. Only reentrant checkpointing, which is refused, needs it.
        if trainer.args.gradient_checkpointing:
            engine.module.disable_input_require_grads()
        callback.selection = attach(engine)

    if trainer.args.gradient_checkpointing:  # TRL does the same for adapters, but the Trainer loses its handle
        trainer.model.disable_input_require_grads()
    _when_engine_is_made(trainer, on_engine)
    direct_output(trainer, callback)
    return callback


def _when_engine_is_made(trainer: Trainer, action: Callable[[Any], None]) -> None:
    """Act between `deepspeed.initialize` and the loading of a checkpoint, where the Trainer has no callback event.

    Only an engine with agsel attached restores the selection from a checkpoint.

    Raises:
        UserError: as the Trainer prepares, it has trained or evaluated before.
    """
    accelerator = trainer.accelerator
    prepare = accelerator.prepare

    def prepare_and_act(*objects: Any, **options: Any) -> Any:
        with agsel.lean_initialization():
            prepared = prepare(*objects, **options)
        if trainer.is_in_train and any(isinstance(item, torch.optim.Optimizer) for item in objects):
            if accelerator.deepspeed_engine_wrapped is None:
                raise UserError(
                    "the Trainer makes no new engine for a model that it has trained or evaluated: make a new Trainer, "
                    "call add_selection on it, and train before you evaluate"
                )
            action(accelerator.deepspeed_engine_wrapped.engine)
        return prepared

    accelerator.prepare = prepare_and_act


def require_supported_trainer(trainer: Trainer) -> None:
    """Refuse what `train_blocks` cannot train.

    Raises:
        UserError: names the setting.
    """
    if any(isinstance(callback, SelectionCallback) for callback in trainer.callback_handler.callbacks):
        raise UserError("add_selection was called twice on one trainer: keep the callback it returned the first time")
    if not trainer.is_deepspeed_enabled:
        raise UserError("agsel needs DeepSpeed: give the trainer a configuration (--deepspeed ds_configs/zero2.json)")
    if "optimizer" in trainer.accelerator.state.deepspeed_plugin.deepspeed_config:
        raise UserError(
            "the DeepSpeed configuration (--deepspeed) has an `optimizer` section: remove it, agsel makes an AdamW "
            "with one param group per block"
        )
    if trainer.optimizer is not None:
        raise UserError("the trainer has an optimizer already: leave it out, agsel makes an AdamW of its own")
    require_adamw(trainer.args)
    checkpointing = trainer.args.gradient_checkpointing_kwargs or {}
    if trainer.args.gradient_checkpointing and checkpointing.get("use_reentrant") and not _is_forced(trainer):
        raise UserError(
            "reentrant gradient checkpointing silently leaves blocks untrained: set use_reentrant to false "
            "(--gradient_checkpointing_kwargs)"
        )


def require_adamw(arguments: TrainingArguments) -> None:
    """Refuse other optimizers.

    Raises:
        UserError: names the setting.
    """
    supported = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
    if arguments.optim not in supported:
        raise UserError(
            f"agsel trains with AdamW, not with {arguments.optim.value} (--optim): use "
            f"{' or '.join(name.value for name in supported)}"
        )


def _is_forced(trainer: Trainer) -> bool:
    """Whether TRL makes checkpointing reentrant, whatever the user says: on adapters at ZeRO-3.

    It does so because DeepSpeed used to release frozen weights in the middle of their layer's second forward; the
    tested one keeps them, and agsel gathers and releases layers as a whole.
    """
    return trainer.accelerator.state.deepspeed_plugin.zero_stage == 3 and hasattr(trainer.model, "peft_config")
