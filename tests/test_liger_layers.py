"""What Liger's kernels keep, where Liger is not installed: as much as its own code does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
from transformers import (
    GPT2Config,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from agsel.errors import UserError
from agsel.planning.memory import Planner, meta_model
from agsel.planning.rehearsal import Peak, Workload, ZeroSettings, liger_layers, rehearsal
from agsel.planning.shapes import MODEL_SHAPES
from tests.distributed import REPOSITORY, environment

SMALL: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGURATIONS: dict[str, PreTrainedConfig] = {
    "llama": MODEL_SHAPES["tiny"](),
    "qwen2": Qwen2Config(**SMALL),
    "phi3": Phi3Config(**SMALL),
    "mistral": MistralConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "smollm3": SmolLM3Config(**SMALL),
}
RECORDED = {
    "llama": (21313536, 17119232),
    "qwen2": (14397440, 12300288),
    "phi3": (16750592, 14653440),
    "mistral": (14397440, 12300288),
    "qwen3": (16166912, 14069760),
    "smollm3": (14397440, 12300288),
}
"""Bytes of activations at the peak of exploring and exploiting steps, by Liger 0.8.5 itself (`rehearsed`, stage 2),
without recomputation."""
BLOCKED = """
import sys
sys.modules["liger_kernel"] = sys.modules["triton"] = None
from tools import plan_memory
plan_memory.main(sys.argv[1:])
"""


def rehearsed(kind: str, stage: int = 2, *, checkpointing: bool = False) -> dict[Any, Peak]:
    work = Workload(
        zero=ZeroSettings(stage=stage, reduce_bucket_size=5e6),
        ranks=2,
        micro_batch=8,
        sequence=256,
        liger_layers=True,
        loss="liger",
        checkpointing=checkpointing,
    )
    return Planner(meta_model(CONFIGURATIONS[kind]), work).plan(2, ("explore", "exploit")).steps


@pytest.mark.parametrize("kind", CONFIGURATIONS)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_description_needs_what_the_kernels_need(kind: str, stage: int, checkpointing: bool) -> None:
    """Memory, arithmetic, bytes of every kernel, and collectives."""
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")
    rehearsed(kind)  # Liger imports more when it is used first
    real = rehearsed(kind, stage, checkpointing=checkpointing)
    with mock.patch.object(liger_layers, "is_liger_installed", return_value=False):
        assert rehearsed(kind, stage, checkpointing=checkpointing) == real


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_description_needs_what_was_recorded(kind: str) -> None:
    keeping = mock.patch.object(rehearsal, "recompute_inputs", return_value=[])
    with keeping, mock.patch.object(liger_layers, "is_liger_installed", return_value=False):
        found = rehearsed(kind)
    assert tuple(peak.parts["activations"] for peak in found.values()) == RECORDED[kind]


def test_every_described_type_is_compared() -> None:
    assert set(liger_layers.DESCRIBED) == set(CONFIGURATIONS)


def test_a_plan_is_the_same_without_liger() -> None:
    plan = ["--model", "tiny", "--gpus", "16", "--gpus_per_host", "8", "--stage", "3", "--liger"]
    blocked = output_of([sys.executable, "-c", BLOCKED, *plan])
    assert blocked[-1].startswith("assumed   what Liger's kernels keep")
    assert any(line.startswith("time ") for line in blocked)
    if liger_layers.is_liger_installed():
        assert output_of([sys.executable, "tools/plan_memory.py", *plan]) == blocked[:-1]


def output_of(command: list[str]) -> list[str]:
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_type_that_is_not_described_is_refused() -> None:
    work = Workload(zero=ZeroSettings(stage=2), ranks=2, micro_batch=1, sequence=8, liger_layers=True)
    planner = Planner(meta_model(GPT2Config(n_layer=2, n_embd=64, n_head=4)), work)
    with (
        mock.patch.object(liger_layers, "is_liger_installed", return_value=False),
        pytest.raises(UserError, match=r"kernels for gpt2 are not described here: .*--loss liger"),
    ):
        planner.plan(1, ("exploit",))
