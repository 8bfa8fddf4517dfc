"""The loss that elements are chosen by: that of training, weighted by what is learnt of each row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from trl import SFTConfig

from agsel.data.formats import ROW_NUMBER
from agsel.data.tokens import Learning
from agsel.training.row_trainer import TOKENS_OF_UNIT, RowTrainer
from tests.tiny import VOCABULARY, tiny_model
from tests.tiny_run import save_model, save_rows

pytestmark = pytest.mark.usefixtures("one_rank")


def mixture() -> PreTrainedModel:
    """Of experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, num_hidden_layers=2, num_local_experts=4, **sizes, router_aux_loss_coef=0.3
        )
    )


def trainer_of(folder: Path, model: PreTrainedModel, **settings: Any) -> RowTrainer:
    tokenizer = AutoTokenizer.from_pretrained(save_model(folder / "tokens"))
    given = [json.loads(line) for line in save_rows(folder / "rows.jsonl", 8).read_text().splitlines()]
    rows = [
        {"prompt": row["question"], "completion": f" {row['answer']}", "messages": None, ROW_NUMBER: number}
        for number, row in enumerate(given)
    ]
    arguments = SFTConfig(str(folder / "run"), use_cpu=True, bf16=False, report_to=[], **settings)
    return RowTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, learning=Learning()
    )


def test_packed_rows(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_model(), packing=True, max_length=32)
    rows = [*trainer.train_dataset]
    assert len(rows) < 8
    learnt = sum(token != -100 for row in rows for token in row["labels"][1:])
    assert 0 < trainer.summed_loss(rows).item() < 2 * learnt * 5 / TOKENS_OF_UNIT


def test_experts_balance_counts_as_the_tokens_do(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, mixture())
    rows = [*trainer.train_dataset]
    batch = trainer.data_collator(rows)
    learnt = int((batch["labels"][:, 1:] != -100).sum())
    mean = trainer.model(**batch).loss  # that of the tokens and that of the experts
    assert trainer.summed_loss(rows).item() == pytest.approx(mean.item() * learnt / TOKENS_OF_UNIT)
