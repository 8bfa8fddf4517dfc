"""agsel added to a plain `transformers.Trainer`: what it trains, with which optimizer settings, at which rates.

And to TRL's with adapters at ZeRO-3, without and with gradient checkpointing.

    python tests/start_ranks.py 2 PORT tests/trainer_worker.py FOLDER

FOLDER/model is there. Writes FOLDER/result.json and FOLDER/adapters-*.json on the first rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import agsel
from agsel import upstream
from agsel.training import add_selection
from tests.distributed import REPOSITORY
from tests.tiny import tiny_batch, tiny_model
from tests.zero.parity_ranks import whole_weights


class Recorder(TrainerCallback):
    """Per step: the learning rate of every param group, the selected blocks and those that changed."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.steps: list[dict[str, Any]] = []
        self.logged: list[list[str]] = []

    def on_log(self, *arguments: Any, logs: dict[str, float], **options: Any) -> None:
        self.logged.append(sorted(logs))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before = copies(self.trainer.model)
        self.rates = [group["lr"] for group in self.trainer.deepspeed.optimizer.param_groups]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        after = copies(self.trainer.model)
        changed = sorted(name for name in after if not torch.equal(after[name], self.before[name]))
        selection = self.trainer.deepspeed.selection
        self.steps.append({"rates": self.rates, "changed": changed, "selected": selection.last.selected})


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        block.name: torch.cat([parameter.detach().flatten() for parameter in block.parameters])
        for block in agsel.find_blocks(model)
    }


def input_hooks(trainer: Trainer) -> int:
    """How many hooks the embedding has, which make its output require a gradient or gather its weight at ZeRO-3."""
    return len(trainer.model.get_input_embeddings()._forward_hooks)


def prepared(folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=str(REPOSITORY / "ds_configs" / "zero2.json"),
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        weight_decay=0.1,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        gradient_checkpointing=True,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
    )
    rows = [{"input_ids": row, "labels": row} for row in tiny_batch(0, 0, 0, rows=24)]
    trainer = Trainer(tiny_model(), arguments, train_dataset=rows)
    changed = {"transformers.trainer:Trainer._prepare_for_training": "0"}
    with (
        mock.patch.dict(upstream.table()["checksums"]["agsel.training.attachment"], changed),
        pytest.raises(
            RuntimeError, match=r"transformers .* differs .* transformers\.trainer:Trainer\._prepare_for_train"
        ),
    ):
        add_selection(trainer, agsel.FullFineTuning())
    add_selection(trainer, agsel.AdaGradSelect(fraction=0.5, explore_steps=3))
    with pytest.raises(ValueError, match="add_selection was called twice"):
        add_selection(trainer, agsel.FullFineTuning())
    return trainer


def train_adapters(folder: Path, checkpointing: bool) -> dict[str, Any]:
    """What TRL's trainer with agsel ends with."""
    arguments = SFTConfig(
        output_dir=str(folder / f"adapters-{checkpointing}"),
        deepspeed=str(REPOSITORY / "ds_configs" / "zero3.json"),
        use_cpu=True,
        bf16=False,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    rows = Dataset.from_dict({"input_ids": tiny_batch(0, 0, 0, rows=16).tolist()})
    adapters = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = SFTTrainer(str(folder / "model"), arguments, train_dataset=rows, peft_config=adapters)
    add_selection(trainer, agsel.AdaGradSelect(fraction=0.5, explore_steps=3))
    trainer.train()
    weights = {name: weight.tolist() for name, weight in whole_weights(trainer.deepspeed).items() if "lora" in name}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"weights": weights, "losses": losses, "hooks": input_hooks(trainer)}


if __name__ == "__main__":
    folder = Path(sys.argv[-1])
    trainer = prepared(folder)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    if trainer.is_world_process_zero():
        group = trainer.deepspeed.optimizer.param_groups[0]
        adam = {name: group[name] for name in ("betas", "eps", "weight_decay", "fused")}
        result = {"steps": recorder.steps, "adam": adam, "hooks": input_hooks(trainer), "logged": recorder.logged}
        result["kept"] = sorted(trainer.state.log_history[0])
        (folder / "result.json").write_text(json.dumps(result))
    for checkpointing in (False, True):
        outcome = train_adapters(folder, checkpointing)
        if trainer.is_world_process_zero():
            (folder / f"adapters-{checkpointing}.json").write_text(json.dumps(outcome))
