"""What agsel touches and what it holds, counted on the ranks of test_exactness.py."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry
from deepspeed.utils import safe_get_full_fp32_param
from peft.tuners.lora import LoraLayer

import agsel
from agsel.zero.gathering import JointGather, gather_jointly
from tests.cases import run_cases
from tests.distributed import RANKS
from tests.tiny import adapted_model, tiny_batch
from tests.zero.parity_ranks import LEAF_MODULES, whole_weights
from tests.zero.rules import RULES, STAGES_OF_RULES, Asking
from tests.zero.scenario import Scenario, run_engine, start_engine, start_steps_late, train_step

ON_GPU = torch.cuda.is_available()
STAGES = (1, 2, 3)
SMALL_BUFFERS = 160
EXPLOIT = partial(agsel.RandomBlocks, fraction=0.4, seed=1)
MANY = partial(agsel.RandomBlocks, fraction=0.9, seed=1)
MIXED = partial(agsel.AdaGradSelect, fraction=0.4, explore_steps=8, epsilon_end=0.5, epsilon_start=0.6, seed=2)


def with_rule(stage: int, dtype: str, policy: partial[agsel.Policy]) -> Scenario:
    """IST over adapters, which are all that it can train."""
    return Scenario(stage=stage, dtype=dtype, policy=policy, adapters="lora" if policy.func is agsel.Ist else None)


def changed_weights(stage: int, dtype: str, policy: partial[agsel.Policy] = MIXED) -> list[dict[str, Any]]:
    """Per step: the selected blocks, the blocks in which a bit of the weights changed (T1), and the resident ones."""
    engine, selection = start_engine(with_rule(stage, dtype, policy))
    block_of = {
        name: block.name
        for block in agsel.find_blocks(engine.module)
        for name, parameter in engine.module.named_parameters()
        if any(parameter is member for member in block.parameters)
    }
    steps = []
    before = whole_weights(engine)
    for step in range(8):
        train_step(engine, step, accumulation=1)
        after = whole_weights(engine)
        changed = {block_of[name] for name in after if not torch.equal(before[name], after[name])}
        selected = set(selection.last.selected)
        steps.append({"mode": selection.last.mode, "selected": selected, "changed": changed})
        steps[-1]["resident"] = set(selection.resident)
        steps[-1]["expected"] = selected | set(named(selection, selection.policy.pinned))
        before = after
    return steps


def master_changes(stage: int, policy: partial[agsel.Policy] = MIXED) -> list[tuple[set[str], set[str]]]:
    """Per step: the selected blocks, and those whose fp32 master, moments or Adam step changed."""
    engine, selection = start_engine(with_rule(stage, "bf16", policy))
    steps = []
    before = optimizer_states(engine, selection)
    for step in range(8):
        train_step(engine, step, accumulation=1)
        after = optimizer_states(engine, selection)
        changed = {name for name in after if not all(map(torch.equal, before[name], after[name]))}
        steps.append((set(selection.last.selected), changed))
        before = after
    return steps


def optimizer_states(engine: Any, selection: Any) -> dict[str, list[torch.Tensor]]:
    """Copies of this rank's master of every block, and of its moments and Adam step, unless these start anew."""
    selection.residency.synchronize()
    states = {}
    for partition in selection.residency.partitions:
        state = engine.optimizer.optimizer.state[partition.master]
        tensors = [partition.master]
        if not partition.must_start_anew:
            tensors += [state["exp_avg"], state["exp_avg_sq"], torch.as_tensor(state["step"])]
        states[selection.blocks[partition.block]] = [t.detach().clone().cpu() for t in tensors]
    return states


def final_states(stage: int) -> dict[str, Any]:
    """The whole optimizer state after a run, all ranks' partitions joined, to compare with the plain loop (T4)."""
    scenario = Scenario(stage=stage, accumulation=1, blocks="layers", zero={"stage3_max_live_parameters": 0})
    engine, selection = start_engine(scenario)
    record = run_engine(engine, selection, scenario)
    outcome = {"selected": record.selected, "states": optimizer_states(engine, selection)}
    if stage < 3:
        outcome["seen by DeepSpeed"] = [safe_get_full_fp32_param(parameter) for parameter in engine.module.parameters()]
    return outcome


def twice(stage: int) -> list[dict[str, torch.Tensor]]:
    """Final weights of two runs with the same seed (T9)."""
    runs = []
    for _ in range(2):
        scenario = Scenario(stage=stage, steps=6)
        engine, selection = start_engine(scenario)
        run_engine(engine, selection, scenario)
        runs.append(whole_weights(engine))
    return runs


def overlapped_and_in_order(stage: int) -> list[dict[str, torch.Tensor]]:
    """Final weights of two runs with gradients larger than a bucket, reduced beside the backward and within it.

    The last rank is late with every gradient, so the reductions of the others are still to come long after the backward
    has gone on.
    """
    runs = []
    for overlap in (True, False):
        zero = {"overlap_comm": overlap, "reduce_bucket_size": 1000}
        scenario = Scenario(stage=stage, dtype="bf16", steps=6, intermediate=100_000 if ON_GPU else 36, zero=zero)
        engine, selection = start_engine(scenario)
        start_steps_late(engine)
        if ON_GPU and torch.distributed.get_rank() == RANKS - 1:
            for parameter in engine.module.parameters():
                parameter.register_post_accumulate_grad_hook(lambda _: torch.cuda._sleep(1_000_000))
        run_engine(engine, selection, scenario)
        runs.append(whole_weights(engine))
    return runs


def foreign_gradients(stage: int) -> list[int]:
    """Whenever a gradient comes: how many others are there that are reduced and not for this rank's partitions."""
    zero = {"overlap_comm": True, "reduce_bucket_size": 1}  # so every gradient is reduced when the next one comes
    engine, _ = start_engine(Scenario(stage=stage, policy=agsel.FullFineTuning, blocks="layers", zero=zero))
    optimizer = engine.optimizer
    parameters = [parameter for group in optimizer.bit16_groups for parameter in group]
    owned = {id(p) for p in parameters if optimizer.is_param_in_current_partition[optimizer.get_param_id(p)]}
    counts = []

    def count(newest: torch.nn.Parameter) -> None:
        others = [p for p in parameters if p is not newest and id(p) not in owned]
        counts.append(sum(p.grad is not None for p in others))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(count)
    train_step(engine, 0, accumulation=1)
    assert 0 < len(owned) < len(parameters)
    return counts


def gradient_elements(stage: int, dtype: str, **options: Any) -> list[dict[str, Any]]:
    """Per point of a step: gradient bytes held by each block, and bytes of all else but weights and states."""
    forget_older_objects()
    engine, selection = start_engine(Scenario(stage=stage, dtype=dtype, policy=MIXED, accumulation=2, **options))
    full = {partition.block: 0 for partition in selection.residency.partitions}
    for partition in selection.residency.partitions:
        full[partition.block] += partition.master.numel() * RANKS  # with the padding that divides it by the ranks
    full_bytes = {selection.blocks[block]: 4 * numel for block, numel in full.items()}
    points: list[dict[str, Any]] = []

    def count(at: str) -> None:
        point = {"at": at, "planned": planned, "explore": plan.kind == "explore", "full": full_bytes}
        states = sum(12 * p.master.numel() for p in selection.residency.partitions if p.is_resident)
        live = settled_bytes(engine.module) - states
        points.append(point | {"held": held_gradients(engine, selection), "live": live})

    for step in range(5):
        plan = selection.policy.plan()
        for micro_step in range(2):
            ids = tiny_batch(step, micro_step, torch.distributed.get_rank()).to(engine.device)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            del loss
            planned = {*named(selection, selection.policy.plan().trainable)}
            count(f"backward {micro_step}")
            engine.step()
        count("step")
    return points


def states_of_an_early_choice(stage: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Per micro-batch of an exploring step: whose states are on the device after its forward, and what is planned."""
    policy = partial(agsel.TopK, fraction=0.5)
    engine, selection = start_engine(Scenario(stage=stage, policy=policy, accumulation=3, choose_early=True))
    found = []
    for micro_step in range(3):
        ids = tiny_batch(0, micro_step, torch.distributed.get_rank()).to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        found.append((selection.resident, named(selection, selection.policy.plan().trainable)))
        engine.backward(loss)
        engine.step()
    return found


def held_gradients(engine: Any, selection: Any) -> dict[str, int]:
    """Bytes of gradient storage per block, over every place where DeepSpeed keeps gradients."""
    optimizer = engine.optimizer
    held = {}
    for partition in selection.residency.partitions:
        tensors: list[Any] = [partition.master.grad]
        for holder in (optimizer.averaged_gradients, getattr(optimizer, "all_grad_tensors", {})):
            tensors += list(holder.get(partition.index) or [])
        for parameter in optimizer.parameters_of_partition(partition.index):
            tensors += [parameter.grad, getattr(parameter, "grad_accum", None)]
            if hasattr(optimizer, "_gradients"):
                tensors.append(optimizer._gradients.get(parameter.ds_id))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
        held[selection.blocks[partition.block]] = sum(storages.values())
    return held


def forget_older_objects() -> None:
    """Make the counts below see only what is made from now on: quick, and blind to earlier cases."""
    gc.collect()
    gc.freeze()


def settled_bytes(model: torch.nn.Module) -> int:
    """`live_bytes` after a moment: gloo's threads let go of the buffer of their last operation a little later."""
    readings = []
    for _ in range(5):
        readings.append(live_bytes(model))
        time.sleep(0.02)
    return min(readings)


def live_bytes(model: torch.nn.Module) -> int:
    """Bytes of all tensor storages that Python can reach in this process, the model's weights left out.

    Weights, because stage 3 gathers and releases them when it likes.
    """
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = [t.untyped_storage() for t in tensors if t.device.type != "meta"]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if address not in weights)


def state_bytes(stage: int, policy: partial[agsel.Policy], checkpointing: bool = False) -> list[dict[str, Any]]:
    """Per point of a step: bytes in device copies of optimizer states, by counting all storages of the process."""
    forget_older_objects()
    engine, selection = start_engine(with_rule(stage, "bf16", policy))
    if checkpointing:  # the backward runs the first layer's forward again
        engine.module.gradient_checkpointing_enable({"use_reentrant": False})
        engine.module.train()
    points: list[dict[str, Any]] = []
    last_explored: tuple[str, ...] = ()
    pinned = named(selection, selection.policy.pinned)

    def count(at: str, expected: tuple[str, ...]) -> None:
        point = {"at": at, "resident": selection.resident, "expected": expected}
        homes = [partition.home for partition in selection.residency.partitions if partition.home is not None]
        host = {home.untyped_storage().data_ptr() for home in homes}
        fp32 = fp32_storages(engine.device.type)
        point["device"] = sum(size for key, size in fp32.items() if key not in host)
        sizes = {selection.blocks[p.block]: 12 * p.master.numel() for p in selection.residency.partitions}
        point["state"] = {block: size for block, size in sizes.items() if size > SMALL_BUFFERS}
        points.append(point)

    for step in range(6):
        ids = tiny_batch(step, 0, torch.distributed.get_rank()).to(engine.device)
        plan = selection.policy.plan()
        planned = named(selection, plan.update.blocks if plan.update else ())
        before = selection.resident
        loss = engine(input_ids=ids, labels=ids).loss
        movable = len(set(planned) - set(pinned))
        early = math.ceil(0.8 * movable) if policy.func.keeps_moments else movable
        assert len(selection.resident) == early + len(pinned)
        assert set(selection.resident) <= {*before, *planned}
        engine.backward(loss)
        del loss
        count("backward", last_explored if plan.kind == "explore" else planned or pinned)
        engine.step()
        if plan.kind == "explore":
            last_explored = selection.last.selected
        count("step", selection.last.selected or pinned)
    return points


def named(selection: Any, blocks: Iterable[int]) -> tuple[str, ...]:
    return tuple(selection.blocks[index] for index in sorted(blocks))


def gathering() -> dict[str, int]:
    """How ZeRO-3 gathers weights, with another lowest layer at each step and room for less than a layer ahead.

    How often it forgot the order; how often it gathered those of a module inside a decoder layer; and how often those
    of a layer, and from the sixth step on, those of a layer of which some were not on their way, or not in one piece.
    """
    zero = {"stage3_prefetch_bucket_size": 100, "stage3_max_reuse_distance": 0}
    policy = partial(agsel.RandomBlocks, fraction=0.3, seed=1)
    engine, _ = start_engine(Scenario(stage=3, blocks="layers", policy=policy, zero=zero))
    coordinator = engine.optimizer._get_param_coordinator()
    layers = set(engine.module.model.layers)
    inside = {module for layer in layers for module in layer.modules()} - layers
    in_flight = engine.module.ds_inflight_param_registry
    counts = dict.fromkeys(("layers", "inside", "late", "pieces"), 0)
    lowest: list[str] = []
    fetch = coordinator.fetch_sub_module

    def counted(module: torch.nn.Module, forward: bool) -> None:
        counts["inside"] += module in inside
        if module in layers:
            missing = [p for p in module.parameters() if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            counts["layers"] += 1
            counts["late"] += bool(missing) and len(lowest) >= 5
            handles = {in_flight[p] for p in module.parameters() if p in in_flight}
            counts["pieces"] += not all(isinstance(handle, JointGather) for handle in handles) or len(handles) > 1
        fetch(module, forward)

    with (
        mock.patch.object(coordinator, "_invalidate_trace", wraps=coordinator._invalidate_trace) as invalidate,
        mock.patch.object(coordinator, "fetch_sub_module", counted),
    ):
        for step in range(10):
            train_step(engine, step, accumulation=1)
            lowest.append(engine.selection.last.selected[0])
    assert len(set(lowest)) > 2
    assert coordinator.is_complete_trace()
    return counts | {"forgotten": invalidate.call_count}


def persistent_weights() -> list[bool]:
    """Per step: whether all small weights, which ZeRO-3 keeps on every rank, were back before DeepSpeed asks for them.

    It would gather them one by one.
    """
    engine, _ = start_engine(Scenario(stage=3, zero={"stage3_param_persistence_threshold": 100}))
    optimizer = engine.optimizer
    post_step, steps = optimizer._post_step, []

    def watched(timers: Any) -> None:
        steps.append({parameter.ds_status for parameter in optimizer.persistent_parameters})
        post_step(timers)

    with mock.patch.object(optimizer, "_post_step", watched):
        for step in range(3):
            train_step(engine, step, accumulation=1)
    return [statuses == {ZeroParamStatus.AVAILABLE} for statuses in steps]


def gathered_weights() -> dict[str, Any]:
    """Weights that do not divide among the ranks, gathered by agsel, by stock again, and by agsel in two types.

    For each: the handle's type, whether every weight is back bit for bit, and how many handles DeepSpeed still holds.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in ((3, 5), (1,), (4, 6), (2, 1, 7))]
    module: Any = torch.nn.ParameterList(torch.nn.Parameter(weight.clone()) for weight in weights)
    deepspeed.zero.Init(module=module, config_dict_or_path=Scenario(stage=3).deepspeed_config())
    module.ds_inflight_param_registry = in_flight = InflightParamRegistry()
    parameters = list(module)
    results: dict[str, Any] = {}

    def gather(name: str) -> None:
        order = parameters[:: (-1) ** torch.distributed.get_rank()]  # DeepSpeed passes them as sets
        handle = order[0].all_gather_coalesced(order)
        in_flight.update(dict.fromkeys(parameters, handle))
        in_flight.pop(parameters[1]).wait()
        handle.wait()
        equal = all(torch.equal(p.cpu(), weight.to(p.dtype)) for p, weight in zip(parameters, weights, strict=True))
        results[name] = {"type": type(handle).__name__, "equal": equal, "in flight": len(in_flight)}
        in_flight.clear()
        parameters[0].partition(parameters)

    with gather_jointly(module):
        gather("jointly")
    gather("as stock")
    gather_jointly(module)
    parameters[2].ds_tensor.data = parameters[2].ds_tensor.bfloat16()
    gather("in two types")
    return results


def evaluated() -> dict[str, Any]:
    """Final weights of runs with and without evaluations between steps, when DeepSpeed knows the order of the modules.

    Each evaluation ends with weights on their way: DeepSpeed expects a backward after it.
    """
    zero = {"stage3_max_live_parameters": 12000, "stage3_max_reuse_distance": 0}  # room for two of four layers

    def run(evaluations: int) -> dict[str, torch.Tensor]:
        engine, _ = start_engine(Scenario(stage=3, policy=MIXED, zero=zero))
        in_flight = engine.module.ds_inflight_param_registry
        on_their_way: list[int] = []
        losses: list[float] = []
        engine.module.lm_head.register_forward_hook(lambda *_: on_their_way.append(len(in_flight)))
        for step in range(6):
            for _ in range(evaluations if step >= 3 else 0):
                ids = tiny_batch(step, 1, torch.distributed.get_rank()).to(engine.device)
                engine.eval()
                with torch.no_grad():
                    losses.append(float(engine(input_ids=ids, labels=ids).loss))
                assert on_their_way[-1], "the evaluation gathered nothing ahead of a backward"
                engine.train()
            train_step(engine, step, accumulation=1)
        assert losses[::2] == losses[1::2], "two evaluations of the same weights differ"
        return whole_weights(engine)

    return {"with": run(evaluations=2), "without": run(evaluations=0)}


def kept_states(stage: int) -> list[bool]:
    """Per step: whether every block's state is on the device, without offloading."""
    engine, selection = start_engine(Scenario(stage=stage, policy=MIXED), offload_states=False)
    steps = []
    for step in range(4):
        train_step(engine, step, accumulation=1)
        steps.append(selection.resident == selection.blocks)
    return steps


def fp32_storages(device: str) -> dict[int, int]:
    """Bytes of every fp32 storage larger than the model's fp32 buffers (rotary frequencies) and Adam steps."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dtype == torch.float32]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == device}
    return {key: size for key, size in sizes.items() if size > SMALL_BUFFERS}


def probes(stage: int) -> dict[str, Any]:
    """What a policy that asks for losses is told, by step, in a run over adapters with dropout, which must be off."""
    scenario = Scenario(stage=stage, blocks="layers", accumulation=2, policy=partial(Asking, fraction=0.5))
    engine, selection = start_engine(scenario, model=adapted_model(dropout=0.5))
    scales = [dict(module.scaling) for module in engine.module.modules() if isinstance(module, LoraLayer)]
    engine.module.model.model.layers[1].eval()
    training = [module.training for module in engine.module.modules()]
    selected = []
    for step in range(5):
        train_step(engine, step, scenario.accumulation)
        selected.append(selection.last.selected)
    assert scales == [module.scaling for module in engine.module.modules() if isinstance(module, LoraLayer)]
    assert training == [module.training for module in engine.module.modules()]
    return {"answers": selection.policy.answers, "selected": selected}


FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
GRADIENTS = {
    "fp32": ("fp32", {}),
    "bf16": ("bf16", {}),
    "bf16-fp32-accumulation": ("bf16", FP32_ACCUMULATION),
}

CASES: dict[str, Callable[[], Any]] = {}
for stage in STAGES:
    CASES |= {f"weights-{stage}-{dtype}": partial(changed_weights, stage, dtype) for dtype in ("fp32", "bf16")}
    CASES[f"masters-{stage}"] = partial(master_changes, stage)
    CASES[f"final-{stage}"] = partial(final_states, stage)
    CASES[f"twice-{stage}"] = partial(twice, stage)
    CASES[f"overlapped-{stage}"] = partial(overlapped_and_in_order, stage)
    CASES[f"kept-{stage}"] = partial(kept_states, stage)
    CASES[f"probes-{stage}"] = partial(probes, stage)
    CASES[f"states-{stage}-exploit"] = partial(state_bytes, stage, EXPLOIT)
    CASES[f"states-{stage}-exploit-many"] = partial(state_bytes, stage, MANY)
    CASES[f"states-{stage}-explore"] = partial(state_bytes, stage, partial(agsel.TopK, fraction=0.4))
    CASES[f"states-{stage}-checkpointing"] = partial(state_bytes, stage, MIXED, checkpointing=True)
    CASES[f"states-{stage}-mixed"] = partial(state_bytes, stage, MIXED)
    for rule, policy in RULES.items() if stage in STAGES_OF_RULES else ():
        CASES[f"weights-{stage}-{rule}"] = partial(changed_weights, stage, "bf16", policy)
        CASES[f"masters-{stage}-{rule}"] = partial(master_changes, stage, policy)
        CASES[f"states-{stage}-{rule}"] = partial(state_bytes, stage, policy)
    for name, (dtype, config) in GRADIENTS.items():
        if not (stage == 1 and config):
            CASES[f"gradients-{stage}-{name}"] = partial(gradient_elements, stage, dtype, config=config)

for stage in (2, 3):
    CASES[f"early-states-{stage}"] = partial(states_of_an_early_choice, stage)
    CASES[f"gradients-{stage}-early"] = partial(gradient_elements, stage, "fp32", choose_early=True)
CASES["gradients-3-leaf-modules"] = partial(gradient_elements, 3, "fp32", zero=LEAF_MODULES)
CASES["foreign-2"] = partial(foreign_gradients, 2)
CASES["gathering"] = gathering
CASES["persistent"] = persistent_weights
CASES["gathered"] = gathered_weights
CASES["evaluated"] = evaluated

if __name__ == "__main__":
    run_cases(CASES)
