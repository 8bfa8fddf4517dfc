"""Save on one number of ranks and continue on others: on the ranks of test_universal.py."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch

from agsel import upstream
from tests.cases import logged, message_of, run_cases
from tests.tiny import tiny_batch
from tests.zero.checkpoint_ranks import SAVED_AFTER, SCENARIOS, SEED_THAT_BEGINS_WITH_ANOTHER_FROZEN_SET
from tests.zero.parity_ranks import whole_weights
from tests.zero.scenario import Scenario, start_engine

RUNS = [f"{kind}-{stage}" for kind in ("adagradselect", "elements") for stage in (1, 2, 3)]
"""Of whole weights, and of single ones."""
STEPS = 16
SAVED_AGAIN_AFTER = 12
RANKS_OF_BATCH, ROWS_OF_RANK = 2, 2
"""Of the unbroken run; other numbers of ranks divide the same rows."""
SCRAMBLED = 0.125
MAXIMAL_RATES = [3e-3, 2e-3, 3e-3, 4e-3]
FP16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}


def root() -> Path:
    return Path(os.environ["AGSEL_TEST_CHECKPOINTS"])


def divided(scenario: Scenario, **config: Any) -> Scenario:
    """The scenario with its global batch divided among the ranks there are."""
    rows = RANKS_OF_BATCH * ROWS_OF_RANK // torch.distributed.get_world_size()
    return replace(scenario, config=scenario.config | {"train_micro_batch_size_per_gpu": rows} | config)


def scenario_of(run: str) -> Scenario:
    """At stage 3 with sub-groups so small that their number depends on the number of ranks."""
    scenario = SCENARIOS[run]
    zero = {"sub_group_size": 100 if scenario.elements else 1000} if scenario.stage == 3 else {}
    rates = MAXIMAL_RATES[: 3 if scenario.elements else 4]
    warmup = {"warmup_min_lr": [1e-3] * len(rates), "warmup_max_lr": rates, "warmup_num_steps": 20}
    schedule = {"scheduler": {"type": "WarmupLR", "params": warmup | {"warmup_type": "linear"}}}
    return divided(replace(scenario, zero=zero), **schedule)


def own_rows(step: int, micro_step: int) -> torch.Tensor:
    """This rank's rows of a global micro-batch, which is the same for any number of ranks."""
    rows = torch.cat([tiny_batch(step, micro_step, rank, ROWS_OF_RANK) for rank in range(RANKS_OF_BATCH)])
    return rows.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def train(engine: Any, selection: Any, scenario: Scenario, first: int, end: int) -> list[dict[str, Any]]:
    """Train from step `first` until `end`; what each step did."""
    steps = []
    for step in range(first, end):
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        for micro_step in range(scenario.accumulation):
            ids = own_rows(step, micro_step).to(engine.device)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach() / scenario.accumulation
        torch.distributed.all_reduce(total)
        last = selection.last
        report = {"selected": last.selected, "mode": last.mode, "counts": selection.counts, "lr": engine.get_lr()}
        steps.append(report | {"loss": float(total) / torch.distributed.get_world_size()})
    return steps


def joined_states(engine: Any, selection: Any) -> dict[str, torch.Tensor]:
    """fp32 [3, elements] of every block: master and moments, the ranks' pieces joined, without padding."""
    selection.residency.synchronize()
    states: dict[str, list[torch.Tensor]] = {name: [] for name in selection.blocks}
    for partition in selection.residency.partitions:
        own = partition.rows.to(engine.device)
        pieces = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(pieces, own)
        parameters = engine.optimizer.parameters_of_partition(partition.index)
        states[selection.blocks[partition.block]] += without_padding(pieces, parameters)
    return {name: torch.cat(parts, dim=1).cpu() for name, parts in states.items()}


def without_padding(pieces: list[torch.Tensor], parameters: list[Any]) -> list[torch.Tensor]:
    """Stages 1 and 2 cut a block in one piece per rank, stage 3 each parameter."""
    if not hasattr(parameters[0], "ds_numel"):
        return [torch.cat(pieces, dim=1)[:, : sum(parameter.numel() for parameter in parameters)]]
    sizes = [parameter.partition_numel() for parameter in parameters]
    cuts = zip(*(piece.split(sizes, dim=1) for piece in pieces), strict=True)
    return [torch.cat(cut, dim=1)[:, : parameter.ds_numel] for cut, parameter in zip(cuts, parameters, strict=True)]


def adam_steps(engine: Any, selection: Any) -> dict[str, set[int]]:
    """Of every block, over its partitions; from the optimizer itself."""
    steps: dict[str, set[int]] = {name: set() for name in selection.blocks}
    for partition in selection.residency.partitions:
        steps[selection.blocks[partition.block]].add(int(engine.optimizer.optimizer.state[partition.master]["step"]))
    return steps


def snapshot(engine: Any, selection: Any) -> dict[str, Any]:
    """All that must survive."""
    groups = engine.optimizer.optimizer.param_groups
    return {
        "weights": whole_weights(engine),
        "states": joined_states(engine, selection),
        "adam steps": adam_steps(engine, selection),
        "param groups": [{key: value for key, value in group.items() if key != "params"} for group in groups],
        "counts": selection.counts,
        "global steps": engine.global_steps,
        "lr": engine.get_lr(),
        "loss scale": float(engine.optimizer.loss_scale),
        "linked": any(getattr(p, "_hp_mapping", None) is not None for p in engine.module.parameters()),
    }


def scrambled_engine(scenario: Scenario) -> tuple[Any, Any]:
    """An engine none of whose weights, settings or selection are those of the saved run."""
    policy = partial(scenario.policy, seed=SEED_THAT_BEGINS_WITH_ANOTHER_FROZEN_SET)
    engine, selection = start_engine(replace(scenario, policy=policy))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        for parameter in engine.module.parameters():
            parameter.data.fill_(SCRAMBLED)
    engine.optimizer.refresh_fp32_params()
    return engine, selection


def unbroken(run: str) -> dict[str, Any]:
    """Save after some steps, and go on."""
    scenario = scenario_of(run)
    engine, selection = start_engine(scenario)
    engine.optimizer.optimizer.param_groups[1]["weight_decay"] = 0.4
    train(engine, selection, scenario, 0, SAVED_AFTER)
    at_save = snapshot(engine, selection) | {"resident": selection.resident}
    engine.save_checkpoint(str(root() / f"saved-{run}"), client_state={"mine": 42})
    steps = train(engine, selection, scenario, SAVED_AFTER, STEPS)
    return {"at save": at_save, "steps": steps, "end": snapshot(engine, selection)}


def continued(run: str, name: str, first: int) -> dict[str, Any]:
    """Load what another number of ranks saved and go on; save again on the way."""
    scenario = scenario_of(run)
    engine, selection = scrambled_engine(scenario)
    folder = root() / f"{name}-{run}"
    if torch.distributed.get_rank() == 0:
        leave_fragment_of_a_killed_run(folder, f"global_step{first}", "values" if scenario.elements else "weight")
    with logged() as messages:
        path, client_state = engine.load_checkpoint(str(folder))
    after_load = snapshot(engine, selection) | {"resident": selection.resident, "messages": messages}
    after_load |= {"path": path, "mine": client_state.get("mine"), "left over": left_over()}
    steps = train(engine, selection, scenario, first, SAVED_AGAIN_AFTER)
    at_save = snapshot(engine, selection)
    if torch.distributed.get_world_size() > RANKS_OF_BATCH:
        engine.save_checkpoint(str(root() / f"again-{run}"))
    steps += train(engine, selection, scenario, SAVED_AGAIN_AFTER, STEPS)
    return {"after load": after_load, "at save": at_save, "steps": steps, "end": snapshot(engine, selection)}


def left_over() -> list[str]:
    """Converted copies that were not removed."""
    return [copy.name for copy in root().glob(".universal-*")]


def leave_fragment_of_a_killed_run(folder: Path, tag: str, trained: str) -> None:
    """Of a conversion of more ranks, which a careless conversion would take for a piece of the weight."""
    copy = root() / f".universal-{folder.name}-{tag}-killed"
    whole = copy / tag / "tmp" / f"model.layers.0.mlp.up_proj.{trained}" / "0"
    whole.mkdir(parents=True)
    torch.save(torch.zeros(5), whole / "fp32.07")
    os.utime(copy, (0, 0))


def half_precision(run: str, dtype: str) -> Scenario:
    """In fp16 with a loss scale that has grown by the save; at stage 3 some weights stay whole on every rank.

    Of those with elements the k projections; and all values, which are far fewer.
    """
    scenario = SCENARIOS[run]
    zero = {"stage3_param_persistence_threshold": 400 if scenario.elements else 100} if scenario.stage == 3 else {}
    return divided(replace(scenario, dtype=dtype, zero=zero), **({"fp16": FP16} if dtype == "fp16" else {}))


def half_precision_saved(run: str, dtype: str, **options: Any) -> dict[str, Any]:
    scenario = half_precision(run, dtype)
    engine, selection = start_engine(scenario)
    train(engine, selection, scenario, 0, 5)
    engine.save_checkpoint(str(root() / f"{dtype}-{run}"), **options)
    return snapshot(engine, selection)


def half_precision_loaded(run: str, dtype: str, **options: Any) -> dict[str, Any]:
    engine, selection = scrambled_engine(half_precision(run, dtype))
    engine.load_checkpoint(str(root() / f"{dtype}-{run}"), **options)
    return snapshot(engine, selection)


def warm_start(run: str, name: str, **options: Any) -> dict[str, Any]:
    """The weights alone."""
    engine, selection = scrambled_engine(scenario_of(run))
    engine.load_checkpoint(str(root() / f"{name}-{run}"), **options)
    return snapshot(engine, selection)


def warm_start_over_all_blocks() -> dict[str, torch.Tensor]:
    """Weights that were frozen in the saved run are trained in this one."""
    run = "adagradselect-3"
    engine, selection = scrambled_engine(replace(scenario_of(run), blocks="all", config=divided(SCENARIOS[run]).config))
    engine.load_checkpoint(str(root() / f"saved-{run}"), load_module_only=True)
    return snapshot(engine, selection)


def without_agsel() -> None:
    """A stock run's checkpoint."""
    scenario = scenario_of("adagradselect-2")
    engine, _ = start_engine(scenario, attach=False)
    ids = own_rows(0, 0).to(engine.device)
    for _ in range(scenario.accumulation):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(root() / "stock"))


def refusals() -> dict[str, str | None]:
    """Messages of what cannot be loaded."""
    scenario = scenario_of("adagradselect-2")
    engine, _ = start_engine(scenario)
    if torch.distributed.get_rank() == 0:
        broken_copies(root() / "saved-adagradselect-2")
        (root() / "empty").mkdir()
    torch.distributed.barrier()

    def message(error: type[Exception], name: str, **options: Any) -> str | None:
        return message_of(error, lambda: engine.load_checkpoint(str(root() / name), **options))

    return {
        "no latest": message(FileNotFoundError, "empty"),
        "no folder": message(FileNotFoundError, "nowhere", tag="global_step1"),
        "other stage": message(FileNotFoundError, "saved-adagradselect-3"),
        "incomplete": message(ValueError, "incomplete"),
        "truncated": message(RuntimeError, "truncated"),
        "stock": message(ValueError, "stock"),
        "changed converter": changed_converter(engine),
        "other blocks": loading_into(divided(Scenario(stage=2, blocks="all")), "saved-adagradselect-2"),
        "no optimizer states": loading_into(
            scenario_of("adagradselect-3"), "saved-adagradselect-3", load_optimizer_states=False
        ),
        "load_universal": message_of(
            ValueError,
            lambda: start_engine(divided(scenario, checkpoint={"load_universal": True})),
        ),
        "left over": ", ".join(left_over()),
    }


def changed_converter(engine: Any) -> str | None:
    """A DeepSpeed whose converter is not the tested one."""
    changed = {"deepspeed.checkpoint.ds_to_universal:main": "0"}
    with mock.patch.dict(upstream.table()["checksums"]["agsel.zero.universal"], changed):
        return message_of(RuntimeError, lambda: engine.load_checkpoint(str(root() / "saved-adagradselect-2")))


def loading_into(scenario: Scenario, name: str, **options: Any) -> str | None:
    engine, _ = start_engine(scenario)
    return message_of(ValueError, lambda: engine.load_checkpoint(str(root() / name), **options))


def broken_copies(folder: Path) -> None:
    """Copies of a checkpoint with a file of the second rank missing, and cut short."""
    name = f"global_step{SAVED_AFTER}/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    for copy in ("incomplete", "truncated"):
        shutil.copytree(folder, root() / copy)
    (root() / "incomplete" / name).unlink()
    os.truncate(root() / "truncated" / name, 1000)


CASES: dict[str, partial[Any]] = {}
for run in RUNS:
    CASES[f"unbroken-{run}"] = partial(unbroken, run)
    CASES[f"half_precision_saved-{run}"] = partial(half_precision_saved, run, "fp16")
    CASES[f"half_precision_loaded-{run}"] = partial(half_precision_loaded, run, "fp16")
    CASES[f"trained_only_saved-{run}"] = partial(half_precision_saved, run, "bf16", exclude_frozen_parameters=True)
    CASES[f"trained_only-{run}"] = partial(half_precision_loaded, run, "bf16", load_module_strict=False)
    CASES[f"continued-{run}"] = partial(continued, run, "saved", SAVED_AFTER)
    CASES[f"chained-{run}"] = partial(continued, run, "again", SAVED_AGAIN_AFTER)
    CASES[f"warm_start-{run}"] = partial(warm_start, run, "saved", load_module_only=True)
    CASES[f"warm_start_same_ranks-{run}"] = partial(warm_start, run, "again", load_module_only=True)
    CASES[f"no_optimizer-{run}"] = partial(warm_start, run, "saved", load_optimizer_states=False)
CASES |= {action.__name__: partial(action) for action in (warm_start_over_all_blocks, without_agsel, refusals)}

if __name__ == "__main__":
    run_cases(CASES)
