"""A DeepSpeed engine whose checkpoints carry the selection, whatever is frozen or evicted at that moment."""

from __future__ import annotations

import logging
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from torch.utils.hooks import RemovableHandle

from agsel.zero.selection import Selection

logger = logging.getLogger("agsel")

CLIENT_STATE_KEY = "agsel"


class SelectiveEngine(DeepSpeedEngine):
    """`DeepSpeedEngine` with block selection; made from one by `agsel.attach`, which sets both attributes."""

    stock = DeepSpeedEngine
    relies_on = ("destroy", "save_checkpoint", "load_checkpoint", "_take_model_step", "_backward_epilogue")
    """Methods of the stock class that this class replaces or whose inner working agsel depends on."""

    selection: Selection
    hooks: list[RemovableHandle]

    def destroy(self) -> None:
        """`DeepSpeedEngine.destroy`, without leaving hooks on the model that would keep the engine alive."""
        for hook in self.hooks:
            hook.remove()
        super().destroy()

    def save_checkpoint(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """`DeepSpeedEngine.save_checkpoint`, with the selection state added to the client state."""
        self.selection.residency.synchronize()
        client_state = (client_state or {}) | {CLIENT_STATE_KEY: self.selection.state_dict()}
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
        """`DeepSpeedEngine.load_checkpoint`, restoring the selection state too, unless only the module is loaded.

        A checkpoint without one (of a run without agsel) starts the selection afresh, with a warning.

        Raises:
            ValueError: the checkpoint's selection is over other blocks.
        """
        self.selection.residency.synchronize()
        with self.selection.everything_trainable():
            path, client_state = super().load_checkpoint(
                load_dir,
                tag,
                load_module_strict,
                load_optimizer_states,
                load_lr_scheduler_states,
                load_module_only,
                custom_load_fn,
            )
        if path is not None:
            self.selection.residency.adopt(self.selection.wanted_in_forward())
            state = client_state.pop(CLIENT_STATE_KEY, None)
            if not load_module_only:
                self._restore_selection(path, state)
        return path, client_state

    def _restore_selection(self, path: str, state: dict[str, Any] | None) -> None:
        if state is None:
            logger.warning("%s holds no selection state: the selection starts afresh", path)
        else:
            self.selection.load_state_dict(state)
