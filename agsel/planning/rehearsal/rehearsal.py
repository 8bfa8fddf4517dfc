"""The rehearsal itself: the model's own forward and backward, with DeepSpeed's and agsel's allocations around them.

Tensors on the meta device have shapes but no data. `Ledger` sees every allocation, of the model and of the engine, and
remembers the fullest moment; so no architecture is hard-coded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel

from agsel.blocks import decoder_layers
from agsel.compilation import compile_layers
from agsel.errors import one_line
from agsel.planning.rehearsal.choice import Choosing, ChoosingPartitioned
from agsel.planning.rehearsal.engines import Partitioned, Rank, Replicated
from agsel.planning.rehearsal.kernels import gpu_kernels, loss_kernels
from agsel.planning.rehearsal.ledger import Ledger
from agsel.planning.rehearsal.trace import Trace
from agsel.planning.rehearsal.workload import Step, Workload
from agsel.recomputation import recompute_inputs


class CannotRehearseError(Exception):
    """The model's own code does not run on the meta device, where tensors have no values."""


@contextmanager
def running_model() -> Iterator[None]:
    """Take torch's complaints about tensors without values for what they are; any other error is a bug.

    Raises:
        CannotRehearseError: so it is.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        raise CannotRehearseError(f"{type(error).__name__}: {one_line(error)[:200]}") from error


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a step on one GPU.

    Attributes:
        parts: bytes by kind.
        flops: floating point operations of the matrix products of forward and backward.
        trace: what the step computes and sends.
    """

    parts: dict[str, int]
    flops: int = 0
    trace: Trace = field(default_factory=Trace)

    @property
    def total(self) -> int:
        """Bytes, as `torch.cuda.max_memory_allocated` counts them."""
        return sum(self.parts.values())


class Rehearsal:
    """A model on the meta device and what every rank does with it.

    Args:
        model: on the meta device, and nobody else's: its layers may be compiled, and the `requires_grad` and data of
            its parameters change.
        workload: the batch, the kernels and the ZeRO settings.
    """

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        self._model = model
        self._workload = workload
        self._ledger = Ledger(answer=not workload.padded)
        if workload.checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
            self._model.disable_input_require_grads()
        if workload.compiled:
            self._compile_layers()

    def run(self, step: Step) -> Peak:
        """Do the last micro-batch of a step, and its update; if nothing is trained, a forward without gradient."""
        trainable = {id(parameter) for index in step.trainable for parameter in step.groups[index]}
        for parameter in self._model.parameters():
            parameter.requires_grad_(id(parameter) in trainable)
        self._model.train(bool(trainable))
        if self._workload.compiled:
            with self._ledger:  # what compiling allocates is forgotten
                self._micro_batch()
        self._ledger.clear()
        rank = self._kind_of_rank(step)(self._model, self._workload, step, self._ledger)
        recomputes = not (step.stock or step.choosing)
        handles = recompute_inputs(decoder_layers(self._model)) if recomputes else []
        with rank.hooks(), self._ledger:
            rank.begin()
            self._micro_batch()
            rank.finish()
            self._ledger.phase = "step"
            rank.update()
        for handle in handles:
            handle.remove()
        return Peak(dict(self._ledger.peak), self._ledger.flops, self._ledger.trace)

    def _kind_of_rank(self, step: Step) -> type[Rank]:
        if step.choosing:
            return ChoosingPartitioned if self._workload.zero.stage == 3 else Choosing
        return Partitioned if self._workload.zero.stage == 3 else Replicated

    def _micro_batch(self) -> None:
        kind, trains = self._workload.loss, self._model.training
        self._ledger.phase = "forward"
        kernels = gpu_kernels(self._model, self._workload, self._ledger)
        losses = loss_kernels(self._model, kind, self._ledger)
        with running_model(), kernels, losses, torch.set_grad_enabled(trains):
            outputs = self._model(**self._inputs(), use_cache=False)
            loss = outputs.loss if kind == "transformers" else outputs.logits
            del outputs
            if trains:
                self._ledger.phase = "backward"
                loss.backward()
        for parameter in self._model.parameters():
            parameter.grad = None

    def _inputs(self) -> dict[str, torch.Tensor]:
        rows, length = self._workload.micro_batch, self._workload.sequence
        tokens = torch.empty(rows, length, dtype=torch.long, device="meta")
        inputs = {"input_ids": tokens}
        if self._workload.loss == "transformers":
            inputs["labels"] = tokens
        if self._workload.padded:
            inputs["attention_mask"] = torch.empty(rows, length, dtype=torch.bool, device="meta")
        return inputs

    def _compile_layers(self) -> None:
        """As for a run: Inductor's decompositions and choice of what to save; but its graphs are run as they are."""
        # slow to import, and rarely needed
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        backend = aot_autograd(
            fw_compiler=self._as_fused_kernels,
            bw_compiler=self._as_fused_kernels,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table,
        )
        compile_layers(self._model, backend=backend, dynamic=False)

    def _as_fused_kernels(self, graph: fx.GraphModule, _: Any) -> Callable[[list[Any]], Any]:
        def run(arguments: list[Any]) -> Any:
            with self._ledger.fusing():
                results = fx.Interpreter(graph).boxed_run(arguments)
            self._ledger.enter(results)
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run
