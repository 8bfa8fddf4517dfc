"""The memory plan: what the rehearsal counts is what PyTorch really keeps, and a run that cannot fit is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaForCausalLM

from agsel.blocks import find_blocks, taking_part
from agsel.elements.choosing import linear_weights
from agsel.planning.memory import (
    MemoryPlan,
    Planner,
    heaviest,
    meta_copy,
    meta_model,
    on_gpu,
    planned_steps,
    spread_evenly,
)
from agsel.planning.rehearsal import Rehearsal, Step, Workload, ZeroSettings
from agsel.planning.rehearsal.ledger import GRANULE, Ledger
from agsel.planning.shapes import MODEL_SHAPES
from agsel.policies import (
    AdaGradSelect,
    FullFineTuning,
    Ist,
    Policy,
    RandomBlocks,
    TopK,
    blocks_of_fraction,
    fraction_of_blocks,
)
from agsel.training.fit import _workload, plan_of_run, require_room_for_choosing, shortage
from tests.distributed import launch, run_ranks
from tests.policies.running import layers as layers_of
from tests.tiny import adapted_model, tiny_batch, tiny_model
from tests.tiny_run import save_model, save_rows, settings
from tools import plan_memory

WORKER = Path(__file__).parent / "memory_worker.py"
LAYERS = 6  # of the built-in shape `tiny`
VOCABULARY = 150_000


def rounded(nbytes: int) -> int:
    return math.ceil(nbytes / GRANULE) * GRANULE


def part_frozen(frozen: Iterable[int], device: str) -> Any:
    """A tiny model in fp32 whose attention is plain PyTorch, with some layers and the embedding frozen."""
    model = tiny_model().to(device)
    model.config._attn_implementation = "eager"
    model.model.embed_tokens.requires_grad_(False)
    for index in frozen:
        model.model.layers[index].requires_grad_(False)
    return model.train()


def really_saved(frozen: Iterable[int]) -> int:
    """Bytes that autograd keeps for the backward of real tensors, parameters and inputs not counted."""
    model, ids = part_frozen(frozen, "cpu"), tiny_batch(0, 0, 0)
    others = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers(), ids]}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids).loss  # noqa: B018
    return sum(rounded(tensor.untyped_storage().nbytes()) for key, tensor in saved.items() if key not in others)


def counted(frozen: Iterable[int], device: str) -> tuple[int, int, int]:
    """What the ledger sees live before the backward and at the peak, and the arithmetic."""
    model, ids = part_frozen(frozen, device), tiny_batch(0, 0, 0).to(device)
    ledger = Ledger()
    ledger.ignore([*model.parameters(), *model.buffers(), ids])
    with ledger:
        loss = model(input_ids=ids, labels=ids).loss
        before_backward = ledger.live.total()
        loss.backward()
    return before_backward, ledger.peak.total(), ledger.flops


@pytest.mark.parametrize("frozen", [(), (0, 1), (1, 3), (0, 1, 2)])
def test_the_meta_device_keeps_what_real_tensors_keep(frozen: tuple[int, ...]) -> None:
    on_meta = counted(frozen, "meta")
    assert on_meta == counted(frozen, "cpu")
    assert on_meta[0] == really_saved(frozen) + rounded(4), "all that lives is what autograd saved, and the loss"


def test_frozen_layers_keep_less_and_compute_less() -> None:
    everything, upper, alternate = (counted(frozen, "meta") for frozen in ((), (0, 1), (1, 3)))
    assert all(part < whole for part, whole in zip(upper, everything, strict=True))
    assert upper[0] < alternate[0] < everything[0], "nothing is kept below the lowest trained layer"


def workload(stage: int = 2, **changed: Any) -> Workload:
    zero = ZeroSettings(stage=stage, overlap_comm=True, reduce_bucket_size=8192, stage3_param_persistence_threshold=100)
    return Workload(**{"zero": zero, "ranks": 2, "micro_batch": 2, "sequence": 64, **changed})


def planner(work: Workload, **options: Any) -> Planner:
    return Planner(meta_model(MODEL_SHAPES["tiny"]()), work, **options)


def plan(work: Workload, count: int = 2, **options: Any) -> MemoryPlan:
    return planner(work, **options).plan(count, ("explore", "exploit", "full"))


def of_layers(model: nn.Module, count: int) -> int:
    return count * sum(p.numel() for p in model.model.layers[0].parameters())  # type: ignore[union-attr, index]


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_and_states_add_up(stage: int) -> None:
    model = meta_model(MODEL_SHAPES["tiny"]())
    total = sum(parameter.numel() for parameter in model.parameters())
    steps = plan(workload(stage)).steps
    for peak in steps.values():
        assert total * 2 <= peak.parts["weights"] <= total * 2 + GRANULE * len(list(model.parameters()))
    assert steps["exploit"].parts["states"] == rounded(of_layers(model, 1) * 12 // 2) * 2
    assert steps["full"].parts["states"] == rounded(total * 12 // 2)
    assert steps["explore"].parts.get("states", 0) == 0, "they arrive when activations have gone"
    assert plan(workload(stage), offload_states=False).steps["explore"].parts["states"] == (
        rounded(of_layers(model, 1) * 12 // 2) * LAYERS
    )


def test_a_rank_of_zero_3_holds_half_the_weights_and_what_it_gathers() -> None:
    whole = plan(workload(2)).steps["exploit"].parts["weights"]
    far_away = replace(workload(3).zero, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0)
    half = plan(workload(3, zero=far_away)).steps["exploit"].parts["weights"]
    assert whole / 2 < half < 0.85 * whole, "half, and the module at work"
    assert plan(workload(3)).steps["exploit"].parts["weights"] > whole, "half, and all that is needed again soon"


def test_one_rank_of_zero_3_uses_its_slices_as_they_are() -> None:
    alone = [plan(workload(stage, ranks=1)).steps["exploit"].parts["weights"] for stage in (2, 3)]
    assert alone[0] == alone[1]


def test_host_memory_and_copies() -> None:
    model = meta_model(MODEL_SHAPES["tiny"]())
    found = plan(workload(ranks=4), count=3, ranks_per_host=2)
    assert (found.host, found.moved) == (of_layers(model, LAYERS) * 3, of_layers(model, 3) * 3)
    assert found.host_needed == 2 * found.host
    assert plan(workload(), offload_states=False).host == 0


def test_more_needs_more() -> None:
    def peaks(found: MemoryPlan) -> list[int]:
        return [peak.total for peak in found.steps.values()]

    def all_larger(large: MemoryPlan, small: MemoryPlan) -> bool:
        return all(more > less for more, less in zip(peaks(large), peaks(small), strict=True))

    usual = plan(workload())
    assert all_larger(plan(workload(micro_batch=4)), usual)
    assert all_larger(plan(workload(sequence=128)), usual)
    assert all_larger(plan(workload(loss="transformers")), plan(workload(loss="liger")))
    assert all_larger(usual, plan(workload(checkpointing=True)))
    assert peaks(usual)[1:] > peaks(plan(workload(ranks=8)))[1:], "states are divided among the ranks"
    assert all_larger(plan(workload(padded=True)), usual)
    one_planner = planner(workload())
    growing = [one_planner.plan(count, ("exploit",)).steps["exploit"].total for count in range(1, LAYERS + 1)]
    assert growing == sorted(set(growing))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulated_gradients_are_there_during_the_forward(stage: int) -> None:
    """Whole ones at stage 1, which reduces them at the end of the window."""
    rehearsed = plan(workload(stage, accumulation=4)).steps["explore"].parts["gradients"]
    elements = of_layers(meta_model(MODEL_SHAPES["tiny"]()), LAYERS)
    assert rehearsed >= 2 * elements if stage == 1 else elements <= rehearsed < 2 * elements
    assert plan(workload(stage)).steps["explore"].parts.get("gradients", 0) < elements


def test_compiled_layers_keep_less() -> None:
    eager, compiled = plan(workload()).steps, plan(workload(compiled=True)).steps
    assert all(compiled[kind].parts["activations"] < eager[kind].parts["activations"] for kind in eager)
    assert [compiled[kind].flops for kind in eager] == [eager[kind].flops for kind in eager]


def test_ligers_layer_kernels_keep_less_and_are_gone_afterwards() -> None:
    pytest.importorskip("liger_kernel")
    usual, liger = (plan(workload(liger_layers=kernels, loss="liger")).steps for kernels in (False, True))
    assert all(liger[kind].parts["activations"] < 0.8 * usual[kind].parts["activations"] for kind in usual)
    ids = tiny_batch(0, 0, 0)
    tiny_model()(input_ids=ids, labels=ids).loss.backward()  # Triton's would need a GPU


def test_the_heaviest_choice_holds_the_embedding_and_the_first_layer() -> None:
    found = planner(workload(), blocks="all")
    names = [found._blocks[index].name for index in sorted(heaviest(found._blocks, 4))]
    assert names == ["embed", "layers.0", "layers.5", "final_norm"]
    assert spread_evenly(24, 7) == [2, 5, 8, 11, 15, 18, 21]
    assert heaviest(planner(workload())._blocks, LAYERS) == set(range(LAYERS))


def test_a_rehearsal_leaves_no_trace() -> None:
    """Steps rehearsed in any order on one model need the same."""
    model = meta_model(MODEL_SHAPES["tiny"]())
    groups = [list(layer.parameters()) for layer in model.model.layers]

    def step(*trained: int) -> Step:
        return Step(
            groups=groups, trainable=frozenset(trained), updated=frozenset(trained), resident=frozenset(trained)
        )

    for stage in (2, 3):
        rehearsal = Rehearsal(model, workload(stage))
        first, other, again = (rehearsal.run(step(*trained)) for trained in ((1, 4), (0, 1, 2), (1, 4)))
        assert first == again != other
        assert all(parameter.numel() and parameter.grad is None for parameter in model.parameters())


def test_a_model_with_weights_and_adapters_has_a_twin_without() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    twin = meta_copy(model, torch.bfloat16)
    shapes = {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()}
    assert {name: (p.shape, p.requires_grad) for name, p in twin.named_parameters()} == shapes
    assert {(p.device.type, p.dtype) for p in twin.parameters()} == {("meta", torch.bfloat16)}
    plain = meta_copy(tiny_model(), torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in plain.parameters()} == {("meta", torch.bfloat16)}
    for stage in (2, 3):
        steps = Planner(meta_copy(model, torch.bfloat16), workload(stage)).plan(1, ("explore", "exploit")).steps
        assert steps["explore"].flops > steps["exploit"].flops > 0


def test_what_does_not_fit_is_said_in_one_line_with_what_would() -> None:
    found = planner(workload(micro_batch=64, sequence=512))
    kinds = ("exploit",)
    largest = found.plan(LAYERS, kinds)
    assert shortage(found, largest, math.ceil(largest.gpu_needed), 10**12) is None
    smaller = found.plan(3, kinds)
    said = shortage(found, largest, math.ceil(smaller.gpu_needed), 10**12)
    assert said is not None
    assert "\n" not in said
    assert f"{largest.gpu_needed / 1e9:.1f} GB" in said
    assert f"{smaller.gpu_needed / 1e9:.1f} GB" in said
    assert "--select_fraction 0.50" in said
    assert found.most_blocks(smaller.gpu_needed, kinds) == 3
    assert found.most_blocks(smaller.gpu_needed - 1, kinds) == 2
    assert found.most_blocks(1e9, kinds) == 0
    of_all = shortage(found, largest, math.ceil(smaller.gpu_needed), 10**12, all_blocks=True)
    assert of_all is not None
    assert "--select_fraction" not in of_all
    assert ": use a smaller --per_device_train_batch_size" in of_all
    of_host = shortage(found, largest, 10**12, largest.host_needed - 1)
    assert of_host is not None
    assert "host memory" in of_host
    assert "--offload_states" in of_host


@pytest.mark.parametrize("blocks", [1, 16, 24, 30, 32, 100, 101, 126, 1000, 1001])
def test_a_fraction_that_is_advised_gives_the_blocks_that_fit(blocks: int) -> None:
    for count in range(1, blocks + 1):
        fraction = float(fraction_of_blocks(count, blocks))
        assert 0 < fraction <= 1
        assert blocks_of_fraction(fraction, blocks) == count
    for policy in (
        AdaGradSelect(fraction=float(fraction_of_blocks(blocks, blocks)), explore_steps=0),
        TopK(fraction=float(fraction_of_blocks(blocks, blocks))),
        RandomBlocks(fraction=float(fraction_of_blocks(blocks, blocks))),
    ):
        policy.start(layers_of(blocks))
        assert policy.blocks_per_step == blocks


def test_the_advice_of_a_run_is_the_count_that_fits() -> None:
    found = planner(workload(micro_batch=64, sequence=512))
    largest, smaller = (found.plan(count, ("exploit",)) for count in (LAYERS, 4))
    said = shortage(found, largest, math.ceil(smaller.gpu_needed), 10**12)
    assert said is not None
    advised = float(said.partition("--select_fraction ")[2].split(",")[0])
    assert blocks_of_fraction(advised, LAYERS) == 4


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        (AdaGradSelect(), ("explore", "exploit")),
        (AdaGradSelect(explore_steps=5), ("explore", "exploit")),
        (AdaGradSelect(explore_steps=0), ("exploit",)),
        (TopK(), ("explore",)),
        (RandomBlocks(), ("exploit",)),
        (FullFineTuning(), ("exploit",)),
    ],
    ids=str,
)
def test_a_method_knows_the_kinds_of_its_steps(policy: Policy, kinds: tuple[str, ...]) -> None:
    assert policy.kinds_of_steps == kinds


def test_a_step_that_only_measures_holds_the_gradients_of_all_and_the_states_of_none() -> None:
    found = planner(workload(accumulation=2)).plan(2, ("probe", "explore"))
    probe, explore = found.steps["probe"], found.steps["explore"]
    assert probe.parts.get("states", 0) == 0
    assert probe.parts["gradients"] == explore.parts["gradients"] > 0
    assert probe.total <= explore.total
    assert probe.flops == explore.flops


def plan_of_ist(**changed: Any) -> MemoryPlan:
    """Of a run over the adapters of two layers of a model whose vocabulary is as large as they come."""
    from peft import LoraConfig, get_peft_model

    config = MODEL_SHAPES["tiny"]()
    config.vocab_size = VOCABULARY
    adapters = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(meta_model(config), adapters, autocast_adapter_dtype=False)
    policy = Ist(fraction=2 / LAYERS)
    return Planner(adapted, workload(**changed), policy=policy).plan(2, planned_steps(policy))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("loss", ["transformers", "trl", "liger"])
def test_forwards_for_losses_make_logits_only_where_steps_do(stage: int, loss: str) -> None:
    found = plan_of_ist(stage=stage, loss=loss)
    logits = 2 * 64 * VOCABULARY * torch.bfloat16.itemsize
    in_fp32 = 2 * logits
    for kind in ("exploit", "losses"):
        made = found.steps[kind].parts["loss"]
        assert made >= logits + in_fp32 if loss == "transformers" else 0 < made < logits
    assert found.steps["losses"].total < found.steps["exploit"].total


@pytest.mark.parametrize("stage", [2, 3])
def test_forwards_for_losses_hold_all_states_of_the_last_step_and_no_gradient(stage: int) -> None:
    found = plan_of_ist(stage=stage)
    exploit, losses = found.steps["exploit"], found.steps["losses"]
    assert losses.parts["states"] == found.moved
    assert "gradients" not in losses.parts
    assert 2 * losses.flops < exploit.flops
    assert found.compute_seconds == replace(found, steps={"exploit": exploit}).compute_seconds
    needed = on_gpu(exploit.total)
    assert found.gpu_needed == needed
    assert replace(found, steps={"exploit": losses, "losses": exploit}).gpu_needed == needed, "whichever is fuller"


@pytest.mark.parametrize(
    ("smoothing", "loss_type", "loss"), [(0.0, "nll", "trl"), (0.1, "nll", "transformers"), (0.1, "dft", "trl")]
)
def test_smoothed_labels_need_the_logits_of_all_tokens(smoothing: float, loss_type: str, loss: str) -> None:
    training = SimpleNamespace(
        packing=False,
        padding_free=False,
        per_device_train_batch_size=2,
        hf_deepspeed_config=SimpleNamespace(config={"zero_optimization": {"stage": 2}}),
        world_size=2,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        use_liger_kernel=False,
        max_length=None,
        pad_to_multiple_of=None,
        label_smoothing_factor=smoothing,
        loss_type=loss_type,
    )
    configuration: Any = SimpleNamespace(training=training, selection=SimpleNamespace(compile_layers=False))
    trainer: Any = SimpleNamespace(train_dataset=Dataset.from_dict({"input_ids": [[1, 2], [3]]}))
    assert _workload(configuration, trainer).loss == loss


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


class Asking(LlamaForCausalLM):
    """Its forward depends on a value, which is not there on the meta device."""

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        assert len(torch.nonzero(input_ids))
        return super().forward(input_ids, **options)


def run_of(model: nn.Module, elements: str | None = None, force: bool = False) -> tuple[Any, Any]:
    """What is read of configuration and trainer."""
    training = SimpleNamespace(
        bf16=True,
        fp16=False,
        use_cpu=False,
        device="cuda",
        world_size=2,
        packing=False,
        padding_free=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        use_liger_kernel=False,
        hf_deepspeed_config=SimpleNamespace(config={"zero_optimization": {"stage": 2}}),
        max_length=None,
        pad_to_multiple_of=None,
        label_smoothing_factor=0.0,
        loss_type="nll",
    )
    configuration: Any = SimpleNamespace(
        training=training,
        selection=SimpleNamespace(
            compile_layers=False, offload_states=True, select_from=0, fold_adapters=False, force=force
        ),
        elements=SimpleNamespace(elements=elements),
        blocks_of=lambda model: taking_part(find_blocks(model)),
        taking_part="layers",
    )
    return configuration, SimpleNamespace(model=model, train_dataset=Dataset.from_dict({"input_ids": [[1, 2], [3]]}))


@contextmanager
def gpus_of(gigabytes: float) -> Iterator[None]:
    properties = SimpleNamespace(total_memory=gigabytes * 1e9)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
        yield


def plan_of(model: nn.Module, policy: Callable[[], Policy] = TopK) -> tuple[str, str | None]:
    """Of a run on GPUs of 80 GB."""
    with gpus_of(80):
        return plan_of_run(*run_of(model), policy())


def test_choosing_elements_is_planned_and_refused_in_time() -> None:
    with gpus_of(80):
        assert require_room_for_choosing(*run_of(tiny_model())) is None
        said = require_room_for_choosing(*run_of(tiny_model(), "gallop"))
        unknown = require_room_for_choosing(*run_of(Asking(tiny_model().config), "gallop"))
    assert said is not None
    assert unknown is not None
    assert said.startswith("memory    choosing elements takes 0.0")
    assert unknown.startswith("memory    choosing elements cannot be planned for this model: ")
    with gpus_of(1):
        with pytest.raises(ValueError, match=r"^choosing elements needs 2\.1 GB on each GPU, .* has 1\.0 GB: use a sm"):
            require_room_for_choosing(*run_of(tiny_model(), "gem"))
        require_room_for_choosing(*run_of(tiny_model(), "gem", force=True))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_choosing_elements_keeps_the_sums_of_all_gradients(stage: int, ranks: int) -> None:
    """In fp32, divided among the ranks. At stage 3 one layer at most is whole beside what is around them."""
    model = meta_model(MODEL_SHAPES["tiny"]())
    groups = [list(layer.values()) for layer in linear_weights(model, None)]
    scored = sum(weight.numel() for group in groups for weight in group)
    every, nothing = frozenset(range(LAYERS)), frozenset[int]()
    step = Step(groups=groups, trainable=every, updated=nothing, resident=nothing, choosing=True)
    work = Workload(zero=ZeroSettings(stage=stage), ranks=ranks, micro_batch=1, sequence=4)
    parts = Rehearsal(model, work).run(step).parts
    assert parts["gradients"] == pytest.approx(4 * scored / ranks, rel=0.1)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    whole = sum(p.nbytes for p in model.parameters())
    if stage == 2:
        assert parts["weights"] == pytest.approx(whole, rel=0.1)
    else:
        least = whole / ranks + whole - LAYERS * layer
        assert 0.95 * least <= parts["weights"] <= 1.05 * (least + layer)


@pytest.mark.usefixtures("joined")
def test_a_model_that_cannot_be_rehearsed_may_train() -> None:
    text, lacking = plan_of(Asking(tiny_model().config))
    assert lacking is None
    assert text.startswith("memory    cannot be planned for this model: ")
    assert "\n" not in text


@pytest.mark.usefixtures("joined")
def test_a_run_plans_the_forwards_that_its_method_asks_for() -> None:
    assert "forward for losses" in plan_of(adapted_model(), Ist)[0]
    assert "forward for losses" not in plan_of(adapted_model(), RandomBlocks)[0]


@pytest.mark.usefixtures("joined")
def test_a_bug_of_the_planner_does_not_switch_the_refusal_off() -> None:
    assert "explore" in plan_of(tiny_model())[0]
    with mock.patch.object(Planner, "plan", side_effect=KeyError("a bug")), pytest.raises(KeyError, match="a bug"):
        plan_of(tiny_model())


def test_the_largest_built_in_shape_is_as_published() -> None:
    model = meta_model(MODEL_SHAPES["llama-3.1-70b"]())
    assert sum(parameter.numel() for parameter in model.parameters()) == 70_553_706_496


@pytest.mark.parametrize(
    "shape", [pytest.param(name, marks=[pytest.mark.slow] if "70b" in name else []) for name in MODEL_SHAPES]
)
def test_the_command_plans_every_built_in_shape(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan_memory.main(["--model", shape, "--gpus", "2", "--stage", "2", "--fraction", "0.3", "--loss", "liger"])
    printed = capsys.readouterr().out
    for row in ("explore", "exploit", "full fine-tuning", "while starting", "host ", "ms of arithmetic", "fits "):
        assert row in printed


def test_the_command_reads_a_model_folder_and_refuses_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    plan_memory.main(["--model", str(tmp_path), "--stage", "3", "--method", "topk", "--checkpointing"])
    assert "exploit" not in capsys.readouterr().out
    through_all = ["--method", "lisa", "--select_from", "2"]
    sizes = [["--gpu_gb", value] for value in ("0", "-5", "nan", "inf")]
    for wrong in (
        *sizes,
        ["--fraction", "0"],
        ["--stage", "3", "--compile"],
        ["--model", str(tmp_path / "none")],
        through_all,
    ):
        with pytest.raises(SystemExit, match=r"agsel: error: [^\n]*$"):
            plan_memory.main(["--model", str(tmp_path), *wrong])


def test_the_command_advises_a_fraction_only_where_it_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    for gpu_gb, words in (("1000", "all 26 blocks"), ("1", "not all 26 blocks")):
        plan_memory.main(["--model", "qwen2.5-0.5b", "--method", "full", "--gpu_gb", gpu_gb])
        printed = capsys.readouterr().out
        assert f"fits      {gpu_gb} GB: {words}" in printed
        assert "--fraction" not in printed


def test_the_tool_plans_single_weights(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", "qwen2.5-0.5b", "--gpus", "1", "--method", "full"]
    plan_memory.main([*command, "--element_density", "0.01"])
    shown = capsys.readouterr().out
    assert "full fine-tuning" not in shown
    assert "0.04 GB per rank" in shown, "12 bytes for each of 3.58 million values"
    with pytest.raises(SystemExit, match=r"at most 1, got 2 \(--element_density\)"):
        plan_memory.main([*command, "--element_density", "2"])


@pytest.mark.parametrize("method", ["full", "ist"])
@pytest.mark.parametrize(("lowest", "layers"), [("0", 24), ("0.5", 12)])
def test_the_tool_plans_adapters(method: str, lowest: str, layers: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Of rank 64 on queries and outputs (896 to 896), keys and values (to 128), and three of 896 and 4864."""
    plan_memory.main(
        ["--model", "qwen2.5-0.5b", "--gpus", "1", "--method", method, "--lora_r", "64", "--select_from", lowest]
    )
    shown = capsys.readouterr().out
    weights = layers * 64 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    assert f"{12 * weights / 1e9:.2f} GB per rank" in shown
    assert ("forward for losses" in shown) == (method == "ist")
    assert "full fine-tuning" not in shown


def test_folding_adapters_takes_less_memory(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = []
    for folding in ([], ["--fold_adapters"]):
        plan_memory.main(["--model", "qwen2.5-0.5b", "--method", "full", "--lora_r", "256", *folding])
        [row] = [line for line in capsys.readouterr().out.splitlines() if "exploit" in line]
        peaks.append(float(row.split()[1]))
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--method", "ist"], "--method ist is for adapters: add --lora_r"),
        (["--fold_adapters"], "--fold_adapters is for adapters: add --lora_r"),
        (["--lora_r", "0"], r"lora_r must be at least 1, got 0 \(--lora_r\)"),
        (["--lora_r", "8", "--element_density", "0.1"], "leave out --lora_r or --element_density"),
    ],
)
def test_the_tool_refuses_adapters_that_cannot_be(wrong: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        plan_memory.main(["--model", "tiny", *wrong])


def test_a_run_prints_its_plan_and_stops_if_it_does_not_fit(tmp_path: Path) -> None:
    model, rows = save_model(tmp_path / "model"), save_rows(tmp_path / "rows.jsonl", 8)
    run = settings(model, rows, tmp_path / "run", max_steps=1)
    refused = launch(WORKER, *run)
    assert refused.returncode != 0
    assert [line.startswith("agsel: error: the run needs") for line in refused.stdout.splitlines()].count(True) == 1
    assert "exploit" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert "done" not in refused.stdout
    forced = run_ranks(WORKER, *run, "--force", "true", ranks=1)
    assert "warning   the run needs" in forced
