"""Runs that check themselves, untouched or with one bit flipped on one rank: on the ranks of test_sanity.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import agsel
from agsel.zero.sanity import SanityError
from tests.cases import message_of, run_cases
from tests.zero.parity_ranks import whole_weights
from tests.zero.scenario import Scenario, run_engine, start_engine, train_step

CULPRIT = 1
EVERY = 2


def scenario(stage: int, **changed: Any) -> Scenario:
    """At stage 3 some weights are partitioned, and the norms are not."""
    zero = {"stage3_param_persistence_threshold": 100} if stage == 3 else {}
    policy = partial(agsel.RandomBlocks, fraction=0.4, seed=4)
    return Scenario(stage=stage, dtype="bf16", steps=8, blocks="layers", policy=policy, zero=zero, **changed)


def flip_a_bit(tensor: torch.Tensor, place: int = -1) -> None:
    """The lowest of an element, by default of the last, on one rank."""
    if torch.distributed.get_rank() == CULPRIT:
        tensor.detach().reshape(-1)[place:].view(torch.uint8)[0] ^= 1


def frozen_block(engine: Any, selection: Any) -> tuple[str, Any]:
    """Name and module of the last layer that the coming step leaves out."""
    planned = selection.policy.plan().trainable
    return last_layer(engine, [name for index, name in enumerate(selection.blocks) if index not in planned])


def last_layer(engine: Any, names: Sequence[str]) -> tuple[str, Any]:
    """Of layers in forward order."""
    return names[-1], engine.module.model.layers[int(names[-1].removeprefix("layers."))]


def before(target: Any, method: str, action: Callable[[], None]) -> None:
    """Do something before the next calls of a method."""
    original = getattr(target, method)

    def acting(*arguments: Any, **options: Any) -> Any:
        action()
        return original(*arguments, **options)

    setattr(target, method, acting)


def clean(stage: int, **changed: Any) -> dict[str, Any]:
    """The same run with checks and without."""
    run = scenario(stage, **changed)
    weights = []
    for every in (EVERY, 0):
        engine, selection = start_engine(run, sanity_checks=every)
        record = run_engine(engine, selection, run)
        weights.append(whole_weights(engine) | {"losses": torch.tensor(record.losses)})
        if every:
            summary = str(selection.sanity)
    return {"checked": weights[0], "plain": weights[1], "summary": summary, "absent": selection.sanity is None}


def changed_while_frozen(stage: int, **changed: Any) -> tuple[str, str | None]:
    """In the optimizer step that is checked, a weight that it does not update."""
    engine, selection = start_engine(scenario(stage, **changed), sanity_checks=EVERY)
    train_step(engine, 0, 1)
    name, layer = frozen_block(engine, selection)
    weight = layer.mlp.down_proj.weight
    before(selection, "commit", lambda: flip_a_bit(getattr(weight, "ds_tensor", weight)))
    return name, message_of(SanityError, lambda: train_step(engine, 1, 1))


def different_on_a_rank(stage: int) -> tuple[str, str | None]:
    """A weight that all ranks hold; at stage 3 after the step, which gathers it anew."""
    engine, selection = start_engine(scenario(stage), sanity_checks=EVERY)
    train_step(engine, 0, 1)
    name, layer = frozen_block(engine, selection)
    weight = layer.input_layernorm.weight
    if stage == 3:
        before(selection.sanity, "after_step", lambda: flip_a_bit(weight))
    else:
        flip_a_bit(weight)
    return name, message_of(SanityError, lambda: train_step(engine, 1, 1))


def without_its_value(stage: int) -> tuple[str, str | None]:
    """A weight that is updated, and does not hold one of its elements on a rank after the step has written them."""
    engine, selection = start_engine(scenario(stage, elements=True), sanity_checks=EVERY)
    train_step(engine, 0, 1)
    planned = selection.policy.plan().trainable
    name, layer = last_layer(engine, [selection.blocks[index] for index in sorted(planned)])
    linear = layer.mlp.down_proj
    before(selection.sanity, "after_step", lambda: flip_a_bit(linear.weight, int(linear.indices[0])))
    return name, message_of(SanityError, lambda: train_step(engine, 1, 1))


def lost_in_host_memory(stage: int) -> tuple[str, str | None]:
    """An optimizer state that waits on the host while the step after a check computes its gradients."""
    engine, selection = start_engine(scenario(stage), sanity_checks=EVERY)
    for step in range(EVERY):
        train_step(engine, step, 1)
    name, _ = frozen_block(engine, selection)
    partition = next(p for p in selection.residency.partitions if selection.blocks[p.block] == name)
    before(engine, "backward", lambda: flip_a_bit(partition.home))
    return name, message_of(SanityError, lambda: train_step(engine, EVERY, 1))


def refreshed(stage: int) -> str | None:
    """What the step after a check says of masters that were made from the bf16 weights again."""
    engine, _ = start_engine(scenario(stage), sanity_checks=EVERY)
    for step in range(EVERY):
        train_step(engine, step, 1)
    engine.optimizer.refresh_fp32_params()
    return message_of(SanityError, lambda: train_step(engine, EVERY, 1))


KINDS = {"frozen": changed_while_frozen, "different": different_on_a_rank, "lost": lost_in_host_memory}
CASES = {f"clean-{stage}": partial(clean, stage) for stage in (1, 2, 3)} | {
    f"{name}-{stage}": partial(kind, stage)
    for name, kind in (KINDS | {"refreshed": refreshed}).items()
    for stage in (1, 2, 3)
}
CASES |= {f"clean-elements-{stage}": partial(clean, stage, elements=True) for stage in (2, 3)}
CASES |= {f"frozen-elements-{stage}": partial(changed_while_frozen, stage, elements=True) for stage in (2, 3)}
CASES |= {f"without its value-{stage}": partial(without_its_value, stage) for stage in (1, 2)}

if __name__ == "__main__":
    run_cases(CASES)
