"""Runs of the tiny model: under DeepSpeed with agsel (on a rank), and as a plain loop without either."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

import agsel
from agsel.blocks import decoder_layers
from agsel.policies import BlockInfo
from tests.cases import require_dtype
from tests.distributed import RANKS
from tests.tiny import WITHOUT_ELEMENTS, adapted_model, element_model, random_mask, tiny_batch, tiny_model

SELECTING: Callable[[], agsel.Policy] = partial(
    agsel.AdaGradSelect, fraction=0.4, explore_steps=10, epsilon_start=0.8, epsilon_end=0.3, seed=3
)
ADAM = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One training run. Equal on the ranks and in the reference."""

    stage: int
    accumulation: int = 1
    clip: float = 0.0
    blocks: str = "all"
    steps: int = 16
    dtype: str = "fp32"
    tied: bool = False
    intermediate: int = 36
    fused: bool = False
    compiled: bool = False
    checkpointing: bool = False
    adapters: Literal["lora", "dora"] | None = None
    elements: bool = False
    select_from: float = 0
    choose_early: bool = False
    policy: Callable[[], agsel.Policy] = SELECTING
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        if self.elements:
            return element_model(intermediate=self.intermediate)
        if self.adapters:
            return adapted_model(dora=self.adapters == "dora")
        return tiny_model(tied=self.tied, intermediate=self.intermediate)

    def deepspeed_config(self) -> dict[str, Any]:
        zero = {"stage": self.stage} | ({"stage3_param_persistence_threshold": 0} if self.stage == 3 else {})
        precision = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True}}}[self.dtype]
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "zero_optimization": zero | self.zero,
            "zero_allow_untested_optimizer": True,
            "timers": {"throughput": {"enabled": False}},  # else it waits for the device at every step and hides races
            **precision,
            **self.config,
        }


@dataclass
class Record:
    """What a run did, step by step."""

    losses: list[float] = field(default_factory=list)
    selected: list[tuple[str, ...]] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    norms: list[dict[str, float]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)


def start_engine(scenario: Scenario, *, attach: bool = True, model: Any = None, **options: Any) -> tuple[Any, Any]:
    """A DeepSpeed engine over the tiny model, or a given one, and agsel's selection on it (None without `attach`).

    At stage 3 agsel gathers whole decoder layers, and autograd then adds up gradients in another order than with
    DeepSpeed's hooks on all modules inside. For bits to be comparable stock must be told to gather whole layers, too.
    """
    import deepspeed

    require_dtype(scenario.dtype)
    model = model or scenario.model()
    if scenario.compiled:
        agsel.compile_layers(model, backend="inductor" if torch.cuda.is_available() else "aot_eager")
    if scenario.stage == 3 and not attach:
        deepspeed.utils.set_z3_leaf_modules(model, [type(decoder_layers(model)[0])])
    groups = agsel.block_param_groups(model, scenario.blocks, scenario.select_from)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(groups, fused=scenario.fused, **ADAM)  # type: ignore[arg-type]
    with agsel.lean_initialization() if attach else nullcontext():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=scenario.deepspeed_config())
    if not attach and engine.device.type == "cuda":  # stock may gather weights before its last step has written them
        engine.register_forward_pre_hook(lambda *_: torch.cuda.synchronize())
    if scenario.choose_early:
        options["choose_early"] = True
    selection = agsel.attach(engine, scenario.policy(), **options) if attach else None
    if scenario.checkpointing:
        engine.module.gradient_checkpointing_enable({"use_reentrant": False})
        engine.module.disable_input_require_grads()  # as `agsel.training` does
    return engine, selection


def train_step(engine: Any, step: int, accumulation: int) -> torch.Tensor:
    """One optimizer step of the engine. Returns this rank's loss, still on its device: the host may go on at once."""
    total = torch.zeros((), device=engine.device)
    for micro_step in range(accumulation):
        ids = on_device(tiny_batch(step, micro_step, torch.distributed.get_rank()), engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        total += loss.detach().float() / accumulation
    return total


def on_device(batch: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The batch there; on GPUs without waiting for the step before, as data loaders do it."""
    return (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)


def start_steps_late(engine: Any) -> None:
    """On GPUs: so that whatever should wait for an optimizer step, and does not, comes before it."""
    if engine.device.type == "cuda":
        engine.optimizer.optimizer.register_step_pre_hook(lambda *_: torch.cuda._sleep(5_000_000))


def run_engine(engine: Any, selection: Any, scenario: Scenario, first: int = 0, record: Record | None = None) -> Record:
    """Train from step `first` to the end of the scenario."""
    record = record or Record()
    losses = []
    for step in range(first, scenario.steps):
        losses.append(train_step(engine, step, scenario.accumulation))
        if selection is not None:
            record.selected.append(selection.last.selected)
            record.modes.append(selection.last.mode)
            record.norms.append(selection.last.norms)
            record.grad_norms.append(selection.last.grad_norm)
    if losses:
        averages = torch.stack(losses)
        torch.distributed.all_reduce(averages)
        record.losses += (averages / torch.distributed.get_world_size()).tolist()
    return record


class Reference:
    """A plain loop on one process: full gradients, one `torch.optim.AdamW` per block, only selected blocks stepped."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.model = scenario.model()
        blocks = [b for b in agsel.find_blocks(self.model) if b.trainable and (scenario.blocks == "all" or b.is_layer)]
        self.blocks = {block.name: list(block.trainable) for block in blocks[int(scenario.select_from) :]}
        self.optimizers = {name: torch.optim.AdamW(parameters, **ADAM) for name, parameters in self.blocks.items()}  # type: ignore[arg-type]
        self.policy = scenario.policy()
        infos = [BlockInfo(name, sum(p.numel() for p in parameters)) for name, parameters in self.blocks.items()]
        self.policy.start(infos)

    def run(self) -> Record:
        record = Record()
        for step in range(self.scenario.steps):
            if probes := self.policy.probes():
                self.policy.observe([self._probe(probe, step) for probe in probes])
            names = list(self.blocks)
            plan = self.policy.plan()
            if self.scenario.choose_early and plan.update is None:
                self._gradients(step, micro_steps=1)
                plan = self.policy.choose_early(
                    {index: self._norm(self.blocks[names[index]]) for index in sorted(plan.trainable)}
                )
            record.losses.append(self._gradients(step, self.scenario.accumulation))
            norms = {index: self._norm(self.blocks[names[index]]) for index in sorted(plan.trainable)}
            update = self.policy.commit(norms)
            selected = [names[index] for index in sorted(update.blocks)]
            for index in update.fresh:
                self.optimizers[names[index]].state.clear()
            record.selected.append(tuple(selected))
            record.modes.append(plan.kind)
            record.norms.append({names[index]: norm for index, norm in norms.items()})
            measured = math.hypot(*norms.values())
            record.grad_norms.append(self._update(selected) if selected else measured)
        return record

    @torch.no_grad()
    def _probe(self, probe: agsel.Probe, step: int) -> float:
        """The mean loss over the ranks' first rows, with the adapters of some layers scaled."""
        names = [list(self.blocks)[index] for index in probe.suppressed]
        layers = [decoder_layers(self.model)[int(name.removeprefix("layers."))] for name in names]
        scalings = [module.scaling for layer in layers for module in layer.modules() if hasattr(module, "scaling")]
        scalings = [scaling for scaling in scalings if isinstance(scaling, dict)]
        for scaling in scalings:
            scaling["default"] *= probe.factor
        batches = [tiny_batch(step, 0, rank)[: max(1, probe.rows // RANKS)] for rank in range(RANKS)]
        losses = [self.model(input_ids=ids, labels=ids).loss.item() for ids in batches]
        for scaling in scalings:
            scaling["default"] /= probe.factor
        return math.fsum(losses) / RANKS

    def _gradients(self, step: int, micro_steps: int) -> float:
        """Of the mean loss over the first micro-batches of a step."""
        self.model.zero_grad()
        micro_batches = [(m, rank) for m in range(micro_steps) for rank in range(RANKS)]
        total = 0.0
        for micro_step, rank in micro_batches:
            ids = tiny_batch(step, micro_step, rank)
            loss = self.model(input_ids=ids, labels=ids).loss / len(micro_batches)
            loss.backward()
            total += loss.item()
        return total

    def _norm(self, parameters: list[torch.nn.Parameter]) -> float:
        return float(
            torch.stack([p.grad.double().square().sum() for p in parameters if p.grad is not None]).sum().sqrt()
        )

    def _update(self, selected: list[str]) -> float:
        parameters = [p for name in selected for p in self.blocks[name]]
        limit = self.scenario.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        for name in selected:
            self.optimizers[name].step()
        return float(norm)


class ElementReference(Reference):
    """The same loop over whole weights of an ordinary model: the other elements get no gradient and are put back."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.model = tiny_model()
        mask = random_mask(self.model, 0.1, WITHOUT_ELEMENTS)
        weights = dict(self.model.named_parameters())
        self.base = {name: weights[name].detach().clone() for name in mask.indices}
        self.chosen = {
            name: torch.zeros(weights[name].numel(), dtype=torch.bool)
            .index_fill(0, indices.long(), True)
            .view(weights[name].shape)
            for name, indices in mask.indices.items()
        }
        self.weights = {name: weights[name] for name in mask.indices}
        self.blocks = {
            block: [weight for name, weight in self.weights.items() if f".{block}." in name] for block in self.blocks
        }
        self.optimizers = {name: torch.optim.AdamW(parameters, **ADAM) for name, parameters in self.blocks.items()}  # type: ignore[arg-type]

    def _gradients(self, step: int, micro_steps: int) -> float:
        loss = super()._gradients(step, micro_steps)
        for name, weight in self.weights.items():
            assert weight.grad is not None
            weight.grad.mul_(self.chosen[name])
        return loss

    def _update(self, selected: list[str]) -> float:
        norm = super()._update(selected)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(torch.where(self.chosen[name], weight, self.base[name]))
        return norm
