"""Exactly the selected blocks change; inactive blocks hold nothing. Counted, on two ranks."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.cases import launch_cases
from tests.tiny import adapted_model, tiny_batch
from tests.zero.exactness_ranks import CASES, MIXED
from tests.zero.rules import RULES
from tests.zero.scenario import Reference, Scenario

A_FEW_SCALARS = 128
"""Bytes; a layer's gradient partition has thousands."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return launch_cases("tests/zero/exactness_ranks.py", tmp_path_factory.mktemp("exactness"))


def cases(prefix: str) -> list[str]:
    return [name for name in CASES if name.startswith(prefix)]


@pytest.mark.parametrize("name", cases("weights"))
def test_only_selected_blocks_change_weights(ranks: list[dict], name: str) -> None:
    rule = RULES.get(name.rpartition("-")[2], MIXED)
    for rank in ranks:
        assert {step["mode"] for step in rank[name]} == set(rule().kinds_of_steps)
        assert len({frozenset(step["selected"]) for step in rank[name]}) > 1
        for step in rank[name]:
            assert step["changed"] == step["selected"]
            assert step["resident"] == step["expected"]


@pytest.mark.parametrize("name", cases("masters"))
def test_only_selected_blocks_change_masters_and_moments(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        for selected, changed in rank[name]:
            assert changed == selected


@pytest.mark.parametrize("name", cases("final"))
def test_moments_of_reselected_blocks_equal_the_plain_loop(ranks: list[dict], name: str) -> None:
    reference = Reference(Scenario(stage=1, blocks="layers"))
    assert ranks[0][name]["selected"] == reference.run().selected
    assert any(0 < count < 16 for count in reference.policy.counts), "some block must have paused"
    for block, parameters in reference.blocks.items():
        expected = [[p.detach() for p in parameters]]
        states = [reference.optimizers[block].state[p] for p in parameters]
        for key in ("exp_avg", "exp_avg_sq"):
            expected.append([s[key] if s else torch.zeros_like(p) for s, p in zip(states, parameters, strict=True)])
        for row in range(3):
            partitions = [rank[name]["states"][block][row] for rank in ranks]
            joined = join_partitions(partitions, parameters, sharded=name.endswith("3"))
            for own, other in zip(joined, expected[row], strict=True):
                torch.testing.assert_close(own, other, rtol=1e-5, atol=2e-7)
        steps = {float(rank[name]["states"][block][3]) for rank in ranks}
        assert steps == {reference.policy.counts[list(reference.blocks).index(block)]}


@pytest.mark.parametrize("name", cases("final")[:2])
def test_deepspeed_reads_no_masters_rather_than_zeros(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        assert set(rank[name]["seen by DeepSpeed"]) == {None}


def join_partitions(
    partitions: list[torch.Tensor], parameters: list[torch.nn.Parameter], sharded: bool
) -> list[torch.Tensor]:
    """Whole parameters from the ranks' flat partitions: of the flat group, or at stage 3 of each parameter."""
    if not sharded:
        flat = torch.cat(partitions)
        sizes = [p.numel() for p in parameters]
        return [piece.view_as(p) for piece, p in zip(flat[: sum(sizes)].split(sizes), parameters, strict=True)]
    ranks = len(partitions)
    sizes = [-(-p.numel() // ranks) for p in parameters]
    pieces = zip(*(partition.split(sizes) for partition in partitions), strict=True)
    return [torch.cat(shards)[: p.numel()].view_as(p) for shards, p in zip(pieces, parameters, strict=True)]


@pytest.mark.parametrize("name", cases("twice"))
def test_the_same_seed_gives_the_same_weights(ranks: list[dict], name: str) -> None:
    first, second = ranks[0][name]
    assert all(torch.equal(first[parameter], second[parameter]) for parameter in first)


@pytest.mark.parametrize("name", cases("overlapped"))
def test_reducing_beside_the_backward_changes_nothing(ranks: list[dict], name: str) -> None:
    if name == "overlapped-1" and len(ranks) > 2:
        pytest.skip("without overlap, stage 1 reduces in another order: more than two addends round differently")
    for rank in ranks:
        overlapped, in_order = rank[name]
        assert all(torch.equal(overlapped[parameter], in_order[parameter]) for parameter in in_order)


def test_a_reduced_gradient_of_another_rank_is_gone_before_the_next_comes(ranks: list[dict]) -> None:
    for rank in ranks:
        counts = rank["foreign-2"]
        assert len(counts) > 20
        assert not any(counts)


@pytest.mark.parametrize("name", cases("states"))
def test_only_planned_or_expected_blocks_have_device_state(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        for point in rank[name]:
            assert point["resident"] == point["expected"], point["at"]
            assert point["device"] == sum(point["state"].get(block, 0) for block in point["resident"]), point["at"]
        assert len({point["resident"] for point in rank[name]}) > 1


@pytest.mark.parametrize("name", cases("kept"))
def test_without_offloading_all_states_stay_on_the_device(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        assert rank[name] == [True] * 4


@pytest.mark.parametrize("name", cases("probes"))
def test_a_policy_is_told_the_losses_that_it_asks_for_before_it_plans(ranks: list[dict], name: str) -> None:
    """Against a plain model without dropout, whose layers' adapters are scaled by hand."""
    expected = []
    for suppressed in ((0, 1), (2, 3)):
        model = adapted_model()
        for layer in suppressed:
            for module in model.model.model.layers[layer].modules():
                if isinstance(module, LoraLayer):
                    module.scaling["default"] *= 0.25
        batches = [tiny_batch(0, 0, rank)[: max(1, 2 // len(ranks))] for rank in range(len(ranks))]
        with torch.no_grad():
            expected.append(sum(float(model(input_ids=ids, labels=ids).loss) for ids in batches) / len(ranks))
    assert abs(expected[0] - expected[1]) > 1e-4
    for rank in ranks:
        assert set(rank[name]["answers"]) == {0, 3}
        assert rank[name]["answers"][0] == pytest.approx(expected, abs=2e-6)
        assert rank[name]["answers"] == ranks[0][name]["answers"]
        for step, selected in enumerate(rank[name]["selected"]):
            lower, upper = rank[name]["answers"][step // 3 * 3]
            assert selected == (("layers.0", "layers.1") if lower > upper else ("layers.2", "layers.3"))


def test_prefetching_survives_every_choice_of_blocks(ranks: list[dict]) -> None:
    assert [rank["gathering"]["forgotten"] for rank in ranks] == [0] * len(ranks)


def test_layers_are_gathered_whole(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["gathering"]["layers"] > 0
        assert rank["gathering"]["inside"] == 0
        assert rank["gathering"]["late"] == 0, "all of a layer is gathered while the one before computes"
        assert rank["gathering"]["pieces"] == 0, "all of a layer is gathered at once"


def test_small_weights_are_gathered_together_after_a_step(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["persistent"] == [True] * 3


def test_evaluations_between_steps_change_nothing(ranks: list[dict]) -> None:
    for rank in ranks:
        runs = rank["evaluated"]
        assert all(torch.equal(runs["with"][name], weight) for name, weight in runs["without"].items())


def test_weights_gathered_jointly_are_those_of_stock(ranks: list[dict]) -> None:
    for rank in ranks:
        gathers = rank["gathered"]
        assert all(gather["equal"] for gather in gathers.values())
        assert gathers["jointly"]["type"] == "JointGather"
        assert gathers["jointly"]["in flight"] == 0
        assert "JointGather" not in (gathers["as stock"]["type"], gathers["in two types"]["type"])


@pytest.mark.parametrize("name", cases("early-states"))
def test_states_come_in_the_forward_after_an_early_choice(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        (before, all_blocks), (after, chosen), (last, still_chosen) = rank[name]
        assert (before, len(all_blocks)) == ((), 7)
        assert chosen == still_chosen
        assert len(chosen) == 3
        assert {*after} == {*last} == {*chosen}


@pytest.mark.parametrize("name", cases("gradients"))
def test_inactive_blocks_hold_no_gradient(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        for point in rank[name]:
            holders = {block for block, size in point["held"].items() if size}
            assert holders == (set() if point["at"] == "step" else point["planned"]), point["at"]
            assert all(size <= point["full"][block] for block, size in point["held"].items())
        exploits = [point for point in rank[name] if not point["explore"]]
        assert exploits


@pytest.mark.parametrize("name", cases("gradients"))
def test_the_backward_leaves_nothing_but_planned_gradients(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        first_step, *others = (rank[name][start : start + 3] for start in range(0, len(rank[name]), 3))
        between_steps = first_step[-1]["live"]
        for *backwards, step in others:
            for point in backwards:
                gradients = sum(point["held"].values())
                assert abs(point["live"] - between_steps - gradients) <= A_FEW_SCALARS, point["at"]
            between_steps = step["live"]
