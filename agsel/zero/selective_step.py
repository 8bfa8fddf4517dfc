"""The optimizer step that both ZeRO families share: norms -> commit -> Adam on the selected blocks -> publish.

The two subclasses say where DeepSpeed keeps gradients and weights; everything that must be equal at all stages is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from agsel.errors import UserError
from agsel.policies import Update
from agsel.zero.residency import Partition
from agsel.zero.selection import Selection
from agsel.zero.timetable import Moment
from agsel.zero.write_through import WriteThrough


class SelectiveStep:
    """Mixin over a DeepSpeed ZeRO optimizer. What it declares first is set in `agsel.attach`.

    Not an `ABC`: Python refuses `__class__` assignment to a class that has one among its bases.
    """

    selection: Selection
    elements: WriteThrough
    chooses_early: bool
    clip_grad: float
    loss_scale: float
    optimizer: torch.optim.Optimizer

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the basic optimizer, whose learning rate some schedules of transformers ask for."""
        return self.optimizer.defaults

    def backward_prologue(self) -> None:
        """Called by the engine when the loss is known, whether `engine.backward` or `loss.backward` follows."""
        super().backward_prologue()  # type: ignore[misc]
        self.selection.timetable.move(Moment.BACKWARD)

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """Refused: DeepSpeed would replace the tensors that agsel moves, and updates would be lost.

        Raises:
            UserError: always.
        """
        raise UserError(
            "engine.offload_states is not supported: remove the call, agsel moves the optimizer states of inactive "
            "blocks to the host itself (offload_states=True of agsel.attach)"
        )

    def refresh_fp32_params(self) -> None:
        """Stock copies the weights over the masters, which may be on their way."""
        self.selection.residency.synchronize()
        super().refresh_fp32_params()  # type: ignore[misc]
        if self.selection.sanity is not None:
            self.selection.sanity.forget()

    def choose_early(self, micro_batches: int) -> None:
        """After the first backward of several: choose by it, if the step explores, and forget the other gradients.

        Args:
            micro_batches: of the step, to whose mean loss each adds its share.
        """
        if not self.chooses_early or self.selection.policy.plan().update is not None:
            return
        update = self.selection.choose_early(self._local_squares(), float(self.loss_scale) / micro_batches)
        if update is not None:
            self._release_gradients(p for p in self.selection.residency.partitions if p.block not in update.blocks)

    def step(self, closure: None = None) -> None:
        """Update the selected blocks, or nothing at all if any rank holds a non-finite gradient."""
        sanity, number = self.selection.sanity, self.selection.policy.step + 1
        if sanity is not None:
            sanity.before_step(number)
        self._begin_step()
        loss_scale = float(self.loss_scale)
        update = self.selection.commit(self._local_squares(), loss_scale)
        self.overflow = update is None
        self._update_scale(self.overflow)  # type: ignore[attr-defined]
        report = self.selection.last
        assert report is not None
        self._global_grad_norm = report.grad_norm
        if update is not None and update.blocks:
            self._update(update, loss_scale * self._clip_divisor(report.grad_norm))
        self._release_gradients(self.selection.residency.partitions)
        if sanity is not None:
            sanity.after_step(number, report.selected)
        self.selection.plan_step()

    def _update(self, update: Update, divisor: float) -> None:
        partitions = [p for p in self.selection.residency.partitions if p.block in update.blocks]
        self._release_gradients(p for p in self.selection.residency.partitions if p.block not in update.blocks)
        for partition in self.selection.residency.in_order_of_arrival(partitions):
            anew = partition.must_start_anew or partition.block in update.fresh
            self._update_partition(partition, divisor, anew=anew)
        self._publish(partitions)

    def _update_partition(self, partition: Partition, divisor: float, *, anew: bool) -> None:
        """Adam on one partition, with its fp32 gradient alive only for that long."""
        gradient = self._take_gradient(partition)
        if divisor != 1:
            gradient.div_(divisor)
        self.selection.residency.wait_for(partition)
        if anew:
            partition.start_anew()
        partition.master.grad = gradient
        self._optimizer_step(partition.index)  # type: ignore[attr-defined]
        partition.master.grad = None

    def _clip_divisor(self, norm: float) -> float:
        return max(1.0, (norm + 1e-6) / self.clip_grad) if self.clip_grad > 0 else 1.0

    def _local_squares(self) -> torch.Tensor:
        """fp64 [blocks]: this rank's share of each block's squared gradient norm, zero where there is no gradient."""
        pieces: list[list[torch.Tensor]] = [[] for _ in self.selection.blocks]
        for partition in self.selection.residency.partitions:
            pieces[partition.block] += self._gradient_pieces(partition)
        return sums_of_squares(pieces, self.selection.residency.device)

    def _take_gradient(self, partition: Partition) -> torch.Tensor:
        """The partition's gradient as one flat tensor of the master's type; the reduced pieces are released."""
        flat = torch.empty_like(partition.master, requires_grad=False)
        torch.cat([piece.reshape(-1) for piece in self._gradient_pieces(partition)], out=flat)
        self._release_gradients([partition])
        return flat

    def write_elements(self, partitions: Iterable[Partition]) -> None:
        """Write the trained elements of these partitions, if there are any, into their weights."""
        raise NotImplementedError

    def watch(self, engine: Any) -> list[RemovableHandle]:
        """Hooks on the engine's model that the stage needs."""
        return []

    def _begin_step(self) -> None:
        """DeepSpeed's own preparations of a step."""
        raise NotImplementedError

    def _gradient_pieces(self, partition: Partition) -> list[torch.Tensor]:
        """This rank's reduced gradient of a partition, in order, padding included; empty if the block has none."""
        raise NotImplementedError

    def _release_gradients(self, partitions: Iterable[Partition]) -> None:
        """Drop every reference to the gradients of these partitions."""
        raise NotImplementedError

    def _publish(self, partitions: Sequence[Partition]) -> None:
        """Copy updated master weights to the model's own, on all ranks."""
        raise NotImplementedError


def sums_of_squares(groups: Sequence[Sequence[torch.Tensor]], device: torch.device) -> torch.Tensor:
    """fp64 [groups]: of the tensors of each group together."""
    flat = [tensor for group in groups for tensor in group]
    if not flat:
        return torch.zeros(len(groups), dtype=torch.float64, device=device)
    # On the CPU, PyTorch adds one after another: in fp32 the norm of 50 million numbers is wrong by 0.4 %.
    precision = torch.float64 if device.type == "cpu" else torch.float32
    squares = torch.stack(torch._foreach_norm(flat, 2, precision)).double().square()
    return torch.stack([own.sum() for own in squares.split([len(group) for group in groups])])
