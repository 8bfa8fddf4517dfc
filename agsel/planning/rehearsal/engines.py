"""What one rank's GPU holds beside the activations: weights, optimizer states, gradients and buffers, by ZeRO stage."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from agsel.blocks import decoder_layers
from agsel.planning.rehearsal.ledger import Kind, Ledger
from agsel.planning.rehearsal.trace import Collective, Operation
from agsel.planning.rehearsal.workload import Step, Workload
from agsel.zero.timetable import late

WORKSPACE_BYTES = 2 * 2**25
"""cuBLAS takes 32 MiB on Hopper GPUs, once for the forward's thread and once for the backward's."""
NORM_BYTES = 8
"""Norms are exchanged in fp64, one of every block, with a checksum and its square."""


class Rank:
    """The engine's side of a step. Each stage keeps weights and gradients in its own way."""

    def __init__(self, model: Any, workload: Workload, step: Step, ledger: Ledger) -> None:
        self._zero, self._step, self._ledger = workload.zero, step, ledger
        self._ranks, self._accumulates = workload.ranks, workload.accumulation > 1
        self._parameters: list[nn.Parameter] = list(model.parameters())
        self._buffers = list(model.buffers())
        self._numels = {parameter: parameter.numel() for parameter in self._parameters}
        self._group_of = {parameter: index for index, group in enumerate(step.groups) for parameter in group}
        self._triggers = {group[0] for group in late(step.groups)}
        self._states: dict[int, torch.Tensor] = {}
        self._gradients: dict[int, list[torch.Tensor]] = {}
        self._waiting: list[nn.Parameter] = []

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Be told of every gradient, as DeepSpeed is."""
        with ExitStack() as stack:
            for parameter in filter(lambda parameter: parameter.requires_grad, self._parameters):
                stack.callback(parameter.register_post_accumulate_grad_hook(self._on_gradient).remove)
            yield

    def begin(self) -> None:
        """What is there before the forward."""
        self._ledger.trace.stock = self._step.stock
        self._workspace = self._ledger.allocate("buffers", WORKSPACE_BYTES, torch.uint8)
        self._load_weights()
        with self._ledger.counting("weights"):
            self._ledger.enter(self._buffers)
        self._fetch_states(self._step.resident)
        if self._accumulates:
            self._hold_earlier_gradients()

    def finish(self) -> None:
        """DeepSpeed's end of a backward."""
        self._reduce()

    def update(self) -> None:
        """The optimizer step: the fp32 gradient of one group at a time, beside it stock DeepSpeed's flattened one."""
        self._exchange("all-reduce", NORM_BYTES * (len(self._step.groups) + 2))
        self._fetch_states(self._step.updated)
        for index in self._step.trainable - self._step.updated:
            self._gradients.pop(index, None)
        for index in self._step.updated:
            self._ledger.trace.updated += self._elements(self._step.groups[index])
            flattened = self._allocate("gradients", self._partition(index)) if self._step.stock else None
            gradient = self._ledger.allocate("gradients", self._partition(index), torch.float32)
            self._gradients.pop(index, None)
            del flattened, gradient

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        self._ledger.trace.gradients += 1
        if parameter in self._triggers:
            self._fetch_states(self._step.updated)
        if self._elements([*self._waiting, parameter]) > self._zero.reduce_bucket_size:
            self._reduce()
        self._waiting.append(parameter)
        if self._moves_into_bucket(parameter):
            parameter.grad = None

    def _moves_into_bucket(self, parameter: nn.Parameter) -> bool:
        return self._numels[parameter] <= self._zero.reduce_bucket_size

    def _fetch_states(self, groups: Iterable[int]) -> None:
        for index in set(groups) - self._states.keys():
            self._states[index] = self._ledger.allocate("states", 3 * self._partition(index), torch.float32)

    def _exchange(self, operation: Operation, nbytes: int, *, every_micro_batch: bool = True) -> None:
        """Note a collective, which one rank alone does not need."""
        if self._ranks > 1:
            self._ledger.trace.exchange(Collective(operation, nbytes, self._ledger.phase, every_micro_batch))

    def _nbytes(self, parameters: Iterable[nn.Parameter]) -> int:
        return sum(self._numels[parameter] * parameter.itemsize for parameter in parameters)

    def _allocate(self, kind: Kind, elements: float) -> torch.Tensor:
        return self._ledger.allocate(kind, int(elements), self._parameters[0].dtype)

    def _elements(self, parameters: Iterable[nn.Parameter]) -> int:
        return sum(self._numels[parameter] for parameter in parameters)

    def _partition(self, index: int) -> int:
        """Elements of a group on one rank."""
        return sum(math.ceil(self._numels[parameter] / self._ranks) for parameter in self._step.groups[index])

    def _load_weights(self) -> None:
        raise NotImplementedError

    def _hold_earlier_gradients(self) -> None:
        """Allocate those of the micro-batches before the last."""
        raise NotImplementedError

    def _reduce(self) -> None:
        """Reduce the gradients in the bucket over the ranks, and keep this rank's share."""
        raise NotImplementedError


class Replicated(Rank):
    """ZeRO-1/2: whole weights; gradients pass through buckets, and each rank keeps those that reach its partition."""

    def _load_weights(self) -> None:
        self._owned = _owned_parameters(self._step.groups, self._ranks)
        self._buckets: list[torch.Tensor] = []
        self._joined: torch.Tensor | None = None
        with self._ledger.counting("weights"):
            self._ledger.enter(self._parameters)

    def _hold_earlier_gradients(self) -> None:
        """Stage 2 has reduced them, stage 1 keeps them whole until the last."""
        for parameter in filter(lambda parameter: parameter.requires_grad, self._parameters):
            if self._zero.stage == 1:
                with self._ledger.counting("gradients"):
                    parameter.grad = torch.empty_like(parameter)
            elif parameter in self._owned:
                self._keep(parameter)

    def _moves_into_bucket(self, parameter: nn.Parameter) -> bool:
        """With agsel gradients stay where they are."""
        return self._step.stock and super()._moves_into_bucket(parameter)

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if self._step.stock and not self._buckets:
            count = 2 if self._zero.overlap_comm else 1
            self._buckets = [self._allocate("buffers", self._zero.reduce_bucket_size) for _ in range(count)]
        super()._on_gradient(parameter)

    def update(self) -> None:
        """And every rank sends the weights that it has updated to all."""
        super().update()
        for index in self._step.updated:
            self._exchange("all-gather", self._nbytes(self._step.groups[index]))

    def _reduce(self) -> None:
        self._exchange("all-reduce", self._nbytes(self._waiting), every_micro_batch=self._zero.stage == 2)
        if self._step.stock:
            self._reduce_as_stock()
        else:
            self._reduce_joined()
        self._waiting.clear()

    def _reduce_as_stock(self) -> None:
        """Through a flat copy into one buffer of all that this rank keeps."""
        self._allocate("buffers", min(self._elements(self._waiting), self._zero.reduce_bucket_size))
        if not self._gradients:
            self._gradients[0] = [self._allocate("gradients", self._elements(self._owned))]
        for parameter in self._waiting:
            parameter.grad = None

    def _reduce_joined(self) -> None:
        """As one piece, which lives until the next; this rank's gradients get their part back."""
        alone = len(self._waiting) == 1
        joined = None if alone else self._allocate("buffers", self._elements(self._waiting))
        for parameter in self._waiting:
            parameter.grad = None
            if parameter in self._owned:
                self._keep(parameter)
            elif alone:
                joined = self._allocate("buffers", self._numels[parameter])
        self._joined = joined

    def _keep(self, parameter: nn.Parameter) -> None:
        piece = self._allocate("gradients", self._numels[parameter])
        self._gradients.setdefault(self._group_of[parameter], []).append(piece)

    def finish(self) -> None:
        """The buckets live during the backward only."""
        super().finish()
        self._buckets.clear()
        self._joined = None


class Partitioned(Rank):
    """ZeRO-3: slices of everything; a module gathers its weights and ahead of time those of the next ones.

    They are given up after use, unless they are small or the next use is near. With agsel a decoder layer counts as one
    module.
    """

    def __init__(self, model: Any, workload: Workload, step: Step, ledger: Ledger) -> None:
        super().__init__(model, workload, step, ledger)
        self._shapes = {parameter: parameter.shape for parameter in self._parameters}
        self._whole = set() if step.stock else set(decoder_layers(model))
        inside = {module for layer in self._whole for module in layer.modules()} - self._whole
        weights = {
            module: list(module.parameters(recurse=module in self._whole))
            for module in model.modules()
            if module not in inside
        }
        self._own = {module: self._large(own) for module, own in weights.items()}
        largest = max((self._elements(self._own[layer]) for layer in self._whole), default=0)
        bucket = self._zero.stage3_prefetch_bucket_size
        self._prefetched = bucket and max(bucket, largest)
        self._order = [module for module, own in self._own.items() if own]
        below = set(
            itertools.takewhile(lambda module: not any(weight.requires_grad for weight in weights[module]), weights)
        )
        self._lowest = sum(1 for module in below if self._own[module])
        passes = [*weights, *(module for module in weights if module not in below)]
        self._hooked = len(passes)
        self._provided = sum(1 for module in passes for weight in weights[module] if self._is_large(weight))
        self._gathered: set[nn.Parameter] = set()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Be told of the beginning and end of every module, too."""
        with super().hooks(), warnings.catch_warnings(), ExitStack() as stack:
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            for position, module in enumerate(self._order):
                for handle in self._module_hooks(position, module):
                    stack.callback(handle.remove)
            yield
        for parameter, shape in self._shapes.items():
            parameter.data = torch.empty(shape, dtype=parameter.dtype, device="meta")

    def _module_hooks(self, position: int, module: nn.Module) -> list[Any]:
        ahead = self._order[position + 1 :]
        forward = [*ahead, *reversed(self._order[self._lowest :])]
        backward = self._order[self._lowest : position][::-1]

        def after(*_: Any) -> None:
            recomputing = torch._C._current_graph_task_id() != -1  # under gradient checkpointing
            if not recomputing and not self._seems_used_next(module, ahead):
                self._release(module, forward)

        def after_backward(_: nn.Module, inputs: tuple[torch.Tensor | None, ...], __: Any) -> None:
            if any(gradient is not None for gradient in inputs):  # else it comes before the weights' gradient
                self._release(module, backward)

        return [
            module.register_forward_pre_hook(lambda *_: self._gather(module, forward)),
            module.register_forward_hook(after),
            module.register_full_backward_pre_hook(lambda *_: self._gather(module, backward)),
            module.register_full_backward_hook(after_backward),
        ]

    def _load_weights(self) -> None:
        self._ledger.trace.hooked, self._ledger.trace.provided = self._hooked, self._provided
        if self._ranks > 1:
            self._slices = self._allocate("weights", sum(math.ceil(n / self._ranks) for n in self._numels.values()))
        self._bucket = self._allocate("buffers", self._zero.reduce_bucket_size)
        arriving = min(self._prefetched, self._elements(self._large(self._parameters)))
        self._arriving = self._allocate("buffers", arriving)
        if self._step.stock:
            self._gradients[-1] = [self._allocate("gradients", sum(map(self._partition, self._step.trainable)))]
        for parameter in self._large(self._parameters):
            self._give_up(parameter)
        with self._ledger.counting("weights"):
            self._ledger.enter(self._parameters)  # the small ones

    def _hold_earlier_gradients(self) -> None:
        for index in self._step.trainable:
            self._keep(index)

    def update(self) -> None:
        """And the small weights, which every rank has whole, are gathered again."""
        super().update()
        small = set(self._parameters) - set(self._large(self._parameters))
        self._exchange("all-gather", self._nbytes(small))

    def _reduce(self) -> None:
        self._exchange("reduce-scatter", self._nbytes(self._waiting))
        if len(self._waiting) > 1:
            self._allocate("buffers", self._elements(self._waiting))  # sorted by rank
        for parameter in self._waiting:
            self._keep(self._group_of[parameter])
            parameter.grad = None
        self._waiting.clear()

    def _keep(self, index: int) -> None:
        if index not in self._gradients and not self._step.stock:
            self._gradients[index] = [self._allocate("gradients", self._partition(index))]

    def _large(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those that are gathered; a single rank uses its slices as they are."""
        return [parameter for parameter in parameters if self._ranks > 1 and self._is_large(parameter)]

    def _is_large(self, parameter: nn.Parameter) -> bool:
        return self._numels[parameter] > self._zero.stage3_param_persistence_threshold

    def _gather(self, module: nn.Module, coming: Sequence[nn.Module]) -> None:
        self._obtain_together(self._own[module])
        room = min(self._prefetched, self._zero.stage3_max_live_parameters - self._elements(self._gathered))
        wanted: dict[nn.Parameter, None] = {}
        for parameter in itertools.chain.from_iterable(self._own[other] for other in coming):
            if room <= 0:
                break
            if parameter not in self._gathered and parameter not in wanted:
                wanted[parameter] = None
                room -= self._numels[parameter]
        self._obtain_together(wanted)

    def _seems_used_next(self, module: nn.Module, ahead: Iterable[nn.Module]) -> bool:
        """For a layer gathered whole, DeepSpeed takes the whole model, where the backward starts, for the next use."""
        if module not in self._whole:
            return False
        return sum(self._elements(self._own[other]) for other in ahead) < self._zero.stage3_max_reuse_distance

    def _release(self, module: nn.Module, coming: Sequence[nn.Module]) -> None:
        unneeded, distance = set(self._own[module]), 0
        for other in coming:
            if distance >= self._zero.stage3_max_reuse_distance or not unneeded:
                break
            unneeded -= set(self._own[other])
            distance += self._elements(self._own[other])
        for parameter in unneeded:
            self._give_up(parameter)

    def _obtain_together(self, parameters: Iterable[nn.Parameter]) -> None:
        missing = [parameter for parameter in parameters if parameter not in self._gathered]
        self._exchange("all-gather", self._nbytes(missing))
        for parameter in missing:
            with self._ledger.counting("weights"):
                parameter.data = torch.empty(self._shapes[parameter], dtype=parameter.dtype, device="meta")
            self._gathered.add(parameter)

    def _give_up(self, parameter: nn.Parameter) -> None:
        parameter.data = torch.empty(0, dtype=parameter.dtype, device="meta")
        self._gathered.discard(parameter)


def _owned_parameters(groups: Sequence[Sequence[nn.Parameter]], ranks: int) -> set[nn.Parameter]:
    """Those of which the fullest rank's partitions hold a piece: it keeps their whole gradients."""
    owned: list[set[nn.Parameter]] = [set() for _ in range(ranks)]
    for group in groups:
        size, offset = math.ceil(sum(parameter.numel() for parameter in group) / ranks), 0
        for parameter in group:
            end = offset + parameter.numel()
            for rank in range(offset // size, math.ceil(end / size)):
                owned[rank].add(parameter)
            offset = end
    return max(owned, key=lambda parameters: sum(parameter.numel() for parameter in parameters))
