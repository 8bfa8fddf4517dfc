"""What a GPU sends in a step: against formulas for a model of two layers, and rings counted by hand."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from agsel.errors import UserError
from agsel.planning.duration import bytes_sent
from agsel.planning.memory import PlannedStep, Planner, meta_model
from agsel.planning.rehearsal import Trace, Workload, ZeroSettings
from agsel.planning.rehearsal.trace import Collective
from agsel.planning.traffic import Cluster, Sent, latency, sent, transfer_seconds

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 8, 16, 100, 2
LAYER = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
HEAD = EMBEDDING = VOCABULARY * HIDDEN
WHOLE = 2 * LAYER + EMBEDDING + HEAD + HIDDEN
ROWS, LENGTH = 2, 32
TWO = Cluster(ranks=2, ranks_per_host=2)
SIXTEEN = Cluster(ranks=16, ranks_per_host=8)


def traced(kind: PlannedStep, stage: int, ranks: int, accumulation: int = 1) -> Trace:
    """A step that updates one of two layers: the upper one, if it is drawn."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    zero = ZeroSettings(
        stage=stage,
        reduce_bucket_size=1,
        stage3_prefetch_bucket_size=0,
        stage3_param_persistence_threshold=0,
        stage3_max_reuse_distance=0,
    )
    work = Workload(
        zero=zero, ranks=ranks, micro_batch=ROWS, sequence=LENGTH, accumulation=accumulation, loss="transformers"
    )
    return Planner(meta_model(config), work).trace(kind, 1)


def bf16(parameters: int) -> int:
    return 2 * parameters


def norms(blocks: int) -> int:
    return 8 * (blocks + 2)


REDUCED = {"full": WHOLE, "explore": 2 * LAYER, "exploit": LAYER}
UPDATED = {"full": WHOLE, "explore": LAYER, "exploit": LAYER}
BLOCKS = {"full": 1, "explore": 2, "exploit": 2}
GATHERED_AGAIN = {"full": WHOLE, "explore": HEAD + HIDDEN + 2 * LAYER, "exploit": HEAD + HIDDEN + LAYER}
"""For the backward of ZeRO-3: down to the lowest layer that is trained."""


@pytest.mark.parametrize("kind", ["full", "explore", "exploit"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_gpus_send_what_the_formulas_say(kind: PlannedStep, stage: int) -> None:
    """Half of what is gathered or scattered, and twice that of what is reduced to all."""
    reduced, updated, again = (bf16(counts[kind]) for counts in (REDUCED, UPDATED, GATHERED_AGAIN))
    gathered = updated + 2 * reduced if stage < 3 else bf16(WHOLE) + again + reduced
    expected = (gathered + 2 * norms(BLOCKS[kind])) / 2
    assert bytes_sent(traced(kind, stage, 2), TWO) == Sent(link=expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_fine_tuning_sends_three_times_the_weights(stage: int) -> None:
    """ZeRO's paper has two times for stages 1 and 2, which scatter gradients; DeepSpeed reduces them to all."""
    total = (3 * bf16(WHOLE) + 2 * norms(1)) * 15 / 16
    found = bytes_sent(traced("full", stage, 16), SIXTEEN)
    assert found == Sent(link=total * 7 / 8, network=total / 8)


def test_one_gpu_sends_nothing() -> None:
    alone = Cluster(ranks=1, ranks_per_host=1)
    for stage in (1, 2, 3):
        trace = traced("explore", stage, 1)
        assert not trace.collectives
        assert bytes_sent(trace, alone) == Sent()


def test_stage_1_reduces_once_for_all_micro_batches() -> None:
    once, every = bf16(LAYER), 4 * bf16(LAYER)
    for stage, reduced in ((1, once), (2, every)):
        found = bytes_sent(traced("exploit", stage, 2, accumulation=4), TWO, accumulation=4)
        assert found.link == reduced + (bf16(LAYER) + 2 * norms(2)) / 2
    per_micro_batch = bf16(WHOLE + GATHERED_AGAIN["exploit"] + LAYER)
    found = bytes_sent(traced("exploit", 3, 2, accumulation=4), TWO, accumulation=4)
    assert found.link == 4 * per_micro_batch / 2 + norms(2)


def test_arithmetic_by_phase() -> None:
    """The upper layer alone is trained, and the backward ends with it."""
    trace, tokens = traced("exploit", 2, 2), ROWS * LENGTH
    products = LAYER - 2 * HIDDEN
    attention = 4 * tokens * LENGTH * HIDDEN // 2
    angles = 2 * LENGTH * HIDDEN // HEADS // 2
    assert trace.flops("forward") == 2 * tokens * (2 * products + HEAD) + 2 * attention + angles
    inputs = HEAD + products
    assert trace.flops("backward") == 2 * tokens * (products + inputs) + 5 * attention // 2
    assert trace.updated == LAYER
    assert trace.gradients == 9


def test_rings_leave_a_host_by_every_gpu() -> None:
    whole = Collective("all-gather", 1600, "forward")
    assert sent(whole, SIXTEEN) == Sent(link=1312.5, network=187.5)
    assert sent(Collective("all-reduce", 1600, "backward"), SIXTEEN) == Sent(link=2625, network=375)
    assert sent(whole, Cluster(ranks=8, ranks_per_host=8)) == Sent(link=1400)
    assert sent(whole, Cluster(ranks=2, ranks_per_host=1)) == Sent(network=800)


def test_the_slower_way_decides_and_hops_add_up() -> None:
    whole = Collective("reduce-scatter", 16_000_000, "backward")
    hops = 10e-6 + 14 * 1.9e-6 + 4e-6
    assert latency(whole, SIXTEEN) == pytest.approx(hops)
    assert transfer_seconds(whole, SIXTEEN, 1e9, 1e9) == pytest.approx(hops + 0.013125)
    assert transfer_seconds(whole, SIXTEEN, 100e9, 1e9) == pytest.approx(hops + 0.001875)
    tree = 10e-6 + 2 * (7 * 1.2e-6 + 8.5e-6)
    assert latency(Collective("all-reduce", 8, "step"), SIXTEEN) == pytest.approx(tree)


def test_hosts_must_be_full() -> None:
    with pytest.raises(UserError, match=r"gpus must be a multiple of gpus_per_host, 8, got 12 \(--gpus\)"):
        Cluster(ranks=12, ranks_per_host=8)
