"""A trainer in whose steps host and device wait less for each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from trl.trainer import utils as trl_utils

from agsel.runs.trainer import ResumableTrainer

RELIES_ON = {trl_utils: ("add_fused_lm_head",)}
"""The loss is TRL's of its fused head."""
SEPARATE = 1000
"""Measures of micro-batches that nobody has read; each takes half a kilobyte of the device, and much less joined."""


class LeanSteps(ResumableTrainer):
    """`ResumableTrainer` with the same losses, gradients and logs.

    TRL reads entropy, accuracy and number of tokens between forward and backward of each micro-batch: the host would
    wait for every forward, and the device then for the host. Here they are read when they are logged, on all ranks. The
    Trainer likewise reads after each backward whether the loss is a number, and counts the model's parameters.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._metrics: Any
        self._total_train_tokens: Any
        self._unread: list[Tensor] = []
        self._operations_per_token: float | None = None
        super().__init__(*arguments, **options)
        self._filters_losses = self.args.logging_nan_inf_filter

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's."""
        if return_outputs or not self.model.training or not self._has_ordinary_loss(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        learnt = outputs.label_mask.sum()
        tokens = learnt if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = -outputs.log_probs.sum() / tokens.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        read = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].shape[1]
        measures = (learnt, outputs.entropy.detach().sum(), outputs.is_top1.sum(), torch.as_tensor(read).to(learnt))
        self._unread.append(torch.stack([measure.double() for measure in measures])[None])
        return loss

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """The Trainer's. In the logs, a loss that is no number counts as the mean of those before it."""
        loss = super().training_step(*arguments, **options)
        if len(self._unread) > SEPARATE:
            self._unread = [torch.cat(self._unread)]
        if not self._filters_losses:
            return loss
        mean = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, mean)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's, which is as many for each token."""
        tokens = inputs["input_ids"].numel()
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) / tokens
        return round(self._operations_per_token * tokens)

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """The Trainer's, where every rank logs: the measures of the steps since the last time are read first."""
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.read_measures()
        if self._keeps_count:
            self.state.num_input_tokens_seen = self._total_train_tokens
        super()._maybe_log_save_evaluate(*arguments, **options)

    def _run_epoch(self, **options: Any) -> None:
        """The Trainer's, which leaves the filter of losses to `training_step`; what follows may log on any rank."""
        self.args.logging_nan_inf_filter = False
        try:
            super()._run_epoch(**options)
        finally:
            self.args.logging_nan_inf_filter = self._filters_losses
        self.read_measures()

    def training_begins(self) -> None:
        """A resumed run counts its tokens on."""
        if self._keeps_count:
            self._total_train_tokens = self.state.num_input_tokens_seen
        super().training_begins()

    @property
    def _keeps_count(self) -> bool:
        """Checkpoints have a place for a number of tokens, which the Trainer fills only when it is asked to."""
        return self.args.include_num_input_tokens_seen == "no"

    def forget_measures(self, before: int) -> None:
        """Those of the forwards since there were so many that nobody had read."""
        del self._unread[before:]

    def _has_ordinary_loss(self, inputs: dict[str, Any]) -> bool:
        return (
            self.compute_loss_func is None
            and self.label_smoother is None
            and self.args.loss_type == "nll"
            and not self.aux_loss_enabled
            and self.accelerator.parallelism_config is None
            and ("attention_mask" in inputs or "position_ids" in inputs)
        )

    def read_measures(self) -> None:
        """On all ranks, of which every one has as many; the next log has their means, as TRL's."""
        if not self._unread:
            return
        unread, self._unread = torch.cat(self._unread), []
        if dist.is_initialized():
            dist.all_reduce(unread)
        found = self._metrics["train"]
        for learnt, entropy, right, read in unread.tolist():
            found["entropy"].append(entropy / learnt if learnt else 0.0)
            found["mean_token_accuracy"].append(right / learnt if learnt else 0.0)
            self._total_train_tokens += int(read)
            found["num_tokens"] = [self._total_train_tokens]
