"""A DeepSpeed engine whose checkpoints carry the selection, whatever is frozen or evicted at that moment."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.utils.hooks import RemovableHandle

from agsel.zero import universal
from agsel.zero.probing import losses_of
from agsel.zero.selection import Selection

logger = logging.getLogger("agsel")

RELIES_ON = {
    DeepSpeedEngine: (
        "load_module_state_dict",
        "_load_checkpoint",
        "_load_zero_checkpoint",
        "_get_ckpt_name",
        "_take_model_step",
        "_backward_prologue",
    )
}
"""Methods of DeepSpeed whose inner working agsel depends on, besides those that the code names."""


class SelectiveEngine(DeepSpeedEngine):
    """`DeepSpeedEngine` with block selection; made from one by `agsel.attach`, which sets both attributes."""

    selection: Selection
    hooks: list[RemovableHandle]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """`DeepSpeedEngine.forward`, in a step's first micro-batch after the forwards that the policy asks for."""
        if self.training and torch.is_grad_enabled() and (probes := self.selection.probes_wanted):
            group = self.optimizer.dp_process_group
            forward, names = super().forward, self.selection.blocks
            self.selection.answer(losses_of(probes, forward, self.module, names, inputs, options, group))
        return super().forward(*inputs, **options)

    def _backward_epilogue(self) -> None:
        """`DeepSpeedEngine._backward_epilogue`; gradients have been reduced."""
        super()._backward_epilogue()
        if not self.is_gradient_accumulation_boundary():
            self.optimizer.choose_early(self.gradient_accumulation_steps())

    def zero_grad(self) -> None:
        """`DeepSpeedEngine.zero_grad` of what can have a gradient, without a walk through all modules."""
        self.selection.drop_gradients()

    def destroy(self) -> None:
        """`DeepSpeedEngine.destroy`, which also takes agsel's hooks off the model and leaves every block trainable.

        A second call, as Python's when the engine is collected, leaves the model alone: another may train it by then.
        """
        hooks, self.hooks = self.hooks, []
        for hook in hooks:
            hook.remove()
        if hooks:
            self.selection.make_all_trainable()
        super().destroy()

    def save_checkpoint(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """`DeepSpeedEngine.save_checkpoint`, with agsel's state added to the client state."""
        self.selection.residency.synchronize()
        state = self.selection.state_dict() | universal.optimizer_state(self)
        client_state = (client_state or {}) | {universal.CLIENT_STATE_KEY: state}
        with self.selection.everything_trainable():
            return super().save_checkpoint(save_dir, tag, client_state, save_latest, exclude_frozen_parameters)

    def load_checkpoint(
        self,
        load_dir: str,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[Any, Any]:
        """`DeepSpeedEngine.load_checkpoint` for any number of ranks, restoring the selection too.

        If another number of ranks saved the checkpoint, a converted copy is loaded, which needs room beside `load_dir`
        while it exists. The selection goes on as it is when only the module is loaded, and, with a warning, when the
        checkpoint holds none because it is of a run without agsel.

        Raises:
            MissingError: there is no checkpoint.
            UserError: its selection is over other blocks, or it cannot be loaded by another number of ranks.
            RunError: it cannot be converted.
        """
        self.selection.residency.synchronize()
        saved = universal.find(self, load_dir, tag, load_optimizer_states, load_module_only)
        if saved.convert and not load_module_only:  # first, so that other blocks are refused before all the work
            self._restore_selection(saved.path, saved.state)
        self.selection.residency.make_room_for_moments()
        stock_load = super().load_checkpoint
        load = (
            partial(universal.load, self, saved, stock_load)
            if saved.convert
            else partial(stock_load, load_dir, saved.tag)
        )
        with self.selection.everything_trainable():
            path, client_state = load(
                load_module_strict=load_module_strict,
                load_optimizer_states=load_optimizer_states,
                load_lr_scheduler_states=load_lr_scheduler_states,
                load_module_only=load_module_only,
                custom_load_fn=custom_load_fn,
            )
            # A checkpoint without frozen weights, or of another number of ranks, brings the values alone.
            self.optimizer.write_elements(self.selection.residency.partitions)
        state = client_state.pop(universal.CLIENT_STATE_KEY, None)
        try:
            if not saved.convert and not load_module_only:
                self._restore_selection(path, state)
        finally:
            self.selection.adopt_states()  # as the restored plan wants them: the others may lose their moments
        return path, client_state

    def _restore_selection(self, path: str | Path, state: dict[str, Any] | None) -> None:
        if state is None:
            logger.warning("%s holds no selection state: the selection goes on as it is", path)
        else:
            self.selection.load_state_dict(state)
