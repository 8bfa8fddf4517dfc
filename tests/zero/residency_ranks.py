"""States that move, against states that never do: on the ranks of test_residency.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from deepspeed.utils import safe_get_full_fp32_param, z3_leaf_module

import agsel
from agsel.zero import residency
from agsel.zero.residency import POISON, SMALLEST_PART, SideStream
from agsel.zero.timetable import Moment
from tests.cases import run_cases
from tests.tiny import tiny_model
from tests.zero.parity_ranks import whole_weights
from tests.zero.rules import RULES, STAGES_OF_RULES, EveryClause
from tests.zero.scenario import Scenario, run_engine, start_engine, start_steps_late, train_step

ON_GPU = torch.cuda.is_available()
MIXED = partial(agsel.AdaGradSelect, fraction=0.5, explore_steps=500, epsilon_end=0.3, seed=4)
NEW_SET_EVERY_STEP = partial(agsel.RandomBlocks, fraction=0.5, seed=4)
POLICIES: dict[str, partial[agsel.Policy]] = {
    "mixed": MIXED,
    "new-set-every-step": NEW_SET_EVERY_STEP,
    "every-clause": partial(EveryClause, fraction=0.4, seed=4),
    **RULES,
}
VARIANTS: dict[str, dict[str, bool]] = {
    "kept": {"offload_states": False},
    "moved": {},
    "in parts": {},
    "not pinned": {"pin_memory": False},
}
LATE = ("fetches", "evictions")
"""Whose copies are made to start late, on GPUs."""


def scenario(stage: int, policy: partial[agsel.Policy], **changed: Any) -> Scenario:
    """On GPUs long, and with blocks so wide that a copy outlasts the work that must wait for it."""
    steps = 12 if not ON_GPU or policy in RULES.values() else 500 if policy is NEW_SET_EVERY_STEP else 60
    intermediate = 100_000 if ON_GPU else 36
    chosen = Scenario(
        stage=stage,
        dtype="bf16",
        steps=steps,
        intermediate=intermediate,
        blocks="all" if policy.func is agsel.Lisa else "layers",
        adapters="lora" if policy.func is agsel.Ist else None,
        policy=policy,
    )
    return replace(chosen, **changed)


def start_copies_late(stream: SideStream) -> None:
    """So that whatever should wait for the copies of a stream, and does not, comes before them."""
    active = stream.active

    def active_late() -> Any:
        with active():
            torch.cuda._sleep(10_000_000)  # 5 ms, for every part
        return active()

    stream.active = active_late  # type: ignore[method-assign]


def watch_leaving(selection: Any) -> dict[str, list[tuple[int, int]]]:
    """Filled with the bytes that wait to leave the device, and those of them into whose room others come.

    When a step has decided on them, at the end of its forward, and at the end of its backward.
    """
    leaving: dict[str, list[tuple[int, int]]] = {"decided": [], "forward": [], "backward": []}
    timetable, residency = selection.timetable, selection.residency
    move, commit = timetable.move, selection.commit

    def note(point: str) -> None:
        leaving[point].append((residency.leaving_bytes, residency.exchanged_bytes))

    def watched_move(moment: Moment) -> None:
        if moment is Moment.BACKWARD:
            note("forward")
        move(moment)
        if moment is Moment.FORWARD and len(leaving["decided"]) == len(leaving["forward"]):
            note("decided")

    def watched_commit(*arguments: Any) -> Any:
        note("backward")
        return commit(*arguments)

    timetable.move, selection.commit = watched_move, watched_commit
    return leaving


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Inside; ZeRO-3's partitions of elements, of which there is any number, begin with such memory as padding."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def equal_reads(engine: Any, selection: Any) -> bool:
    """Whether DeepSpeed reads the same masters while they are on their way to the host and after that, at stage 3."""
    selection.residency.keep_only(())
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    at_once = [safe_get_full_fp32_param(parameter) for parameter in parameters]
    selection.residency.synchronize()
    after = [safe_get_full_fp32_param(parameter) for parameter in parameters]
    return at_once == after if engine.zero_optimization_stage() < 3 else all(map(torch.equal, at_once, after))


def refreshed(engine: Any, selection: Any) -> bool:
    """Whether all masters are bf16 numbers after DeepSpeed copies the weights over them while they are on their way."""
    selection.residency.keep_only(range(len(selection.blocks)))
    engine.optimizer.refresh_fp32_params()
    selection.residency.synchronize()
    masters = [partition.master for partition in selection.residency.partitions]
    return all(torch.equal(master, master.bfloat16().float()) for master in masters)


def poisoned_and_kept(stage: int, policy: partial[agsel.Policy], **changed: Any) -> dict[str, Any]:
    """Final weights of a run whose stale copies are NaN, and of one whose states stay on the device."""
    run = scenario(stage, policy, **changed)
    results: dict[str, Any] = {}
    variants = dict(VARIANTS)
    if policy is not MIXED:
        del variants["not pinned"]
    elif ON_GPU:
        variants |= {f"late {copies}": {} for copies in LATE}
    for name, options in variants.items():
        residency.SMALLEST_PART = SMALLEST_PART if name == "moved" else 4
        with mock.patch.dict("os.environ", {POISON: "1"}), uninitialised_memory_is_nan():
            engine, selection = start_engine(run, **options)
        start_steps_late(engine)
        if name.startswith("late "):
            start_copies_late(getattr(selection.residency, name.replace("late ", "_")))
        leaving = watch_leaving(selection)
        record = run_engine(engine, selection, run)
        results[name] = {"leaving": leaving}
        weights = {key: weight.cpu() for key, weight in whole_weights(engine).items()}
        results[name] |= {"weights": weights, "losses": record.losses, "selected": record.selected}
        results[name]["moved_bytes"] = selection.residency.moved_bytes
        results[name]["reads equal"] = equal_reads(engine, selection)
        results[name]["refreshed"] = refreshed(engine, selection)
        travelling = 12 if policy.func.keeps_moments else 4
        results["bytes"] = {
            selection.blocks[p.block]: travelling * p.master.numel() for p in selection.residency.partitions
        }
        hooks = engine.hooks
        engine.destroy()
        results[name]["hooks left"] = sum(hook.id in (hook.hooks_dict_ref() or {}) for hook in hooks)
    return results


def trained_again(stage: int) -> dict[str, Any]:
    """Final weights of a model whose first engine was destroyed, and of a fresh one that starts from its weights."""
    run = Scenario(stage=stage, steps=4, policy=NEW_SET_EVERY_STEP, blocks="layers")
    engine, selection = start_engine(run)
    run_engine(engine, selection, run)
    halfway, used = whole_weights(engine), engine.module
    engine.destroy()
    assert not any(isinstance(getattr(p, "all_gather_coalesced", None), partial) for p in used.parameters())
    fresh = tiny_model(intermediate=run.intermediate)
    fresh.load_state_dict(halfway)
    finals = {}
    first = engine
    for name, model in {"used": used, "fresh": fresh}.items():
        engine, selection = start_engine(run, model=model)
        train_step(engine, run.steps, run.accumulation)
        before = what_an_engine_sets(model)
        first.destroy()  # as Python does when it collects the engine
        assert what_an_engine_sets(model) == before, "a destroyed engine changed the model of another"
        run_engine(engine, selection, run)
        finals[name] = whole_weights(engine)
    return finals | {"halfway": halfway}


def what_an_engine_sets(model: torch.nn.Module) -> list[Any]:
    """What agsel sets on a model, for as long as it trains it."""
    parameters = [(p.requires_grad, getattr(p, "all_gather_coalesced", None)) for p in model.parameters()]
    return [*parameters, *map(z3_leaf_module, model.modules())]


CASES: dict[str, partial[Any]] = {
    f"stage{stage}-{name}": partial(poisoned_and_kept, stage, policy)
    for stage in (1, 2, 3)
    for name, policy in POLICIES.items()
    if name not in RULES or stage in STAGES_OF_RULES
}
CASES["stage3-checkpointing"] = partial(poisoned_and_kept, 3, MIXED, adapters="lora", checkpointing=True)

CASES |= {
    f"stage{stage}-elements-mixed": partial(
        poisoned_and_kept, stage, MIXED, elements=True, intermediate=300_000 if ON_GPU else 36
    )
    for stage in (2, 3)
}

AGAIN = {f"again-{stage}": partial(trained_again, stage) for stage in (1, 2, 3)}

if __name__ == "__main__":
    run_cases(CASES | AGAIN)
