"""launch/evaluate.py on two GPUs finds what it finds on one, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from agsel.evaluation.batches import SHARE, room
from agsel.evaluation.loading import limit_memory
from agsel.evaluation.measures import generate
from tests.distributed import launch
from tests.test_evaluate import alone, arguments
from tools import arithmetic


def test_two_gpus_find_what_one_finds(tmp_path: Path) -> None:
    arithmetic.write_model(tmp_path / "model", seed=5)
    data = arithmetic.draw_data(seed=9)["two_step_heldout"][:100]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    outputs = [tmp_path / "one.json", tmp_path / "two.json"]
    words = [arguments(tmp_path / "model", tmp_path / "rows.jsonl", output) for output in outputs]
    by_one, by_two = alone(*words[0]), launch("launch/evaluate.py", *words[1])
    assert by_one.returncode == 0, by_one.stderr
    assert by_two.returncode == 0, by_two.stdout
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert outputs[0].with_suffix(".jsonl").read_bytes() == outputs[1].with_suffix(".jsonl").read_bytes()


class Numbers:
    """A tokenizer whose texts are the numbers of the tokens."""

    pad_token_id, eos_token_id = 0, 1

    def batch_decode(self, rows: Tensor, **_: bool) -> list[str]:
        return [str(row.tolist()) for row in rows]


def test_a_batch_in_bf16_gives_the_same_texts_again() -> None:
    """Near ties are frequent: a random model of the size of SmolLM2-135M, rows of many lengths."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    lengths = torch.randint(40, 120, (128,)).tolist()
    prompts = [torch.randint(5, 49_000, (length,)).tolist() for length in lengths]
    first, *others = (generate(model.eval(), cast(Any, Numbers()), prompts, 100) for _ in range(4))
    assert others == [first] * 3


def test_batches_keep_to_the_fraction_of_the_memory_that_is_allowed() -> None:
    device = torch.device("cuda", 0)
    torch.empty(0, device=device)
    free, total = torch.cuda.mem_get_info(device)
    try:
        limit_memory(device, 0.125 * free / total)
        assert room(device) <= SHARE * 0.126 * free
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(free // 4, dtype=torch.uint8, device=device)
    finally:
        limit_memory(device, 1.0)
    assert room(device) > SHARE * 0.9 * free
