"""What a run is like, for comparison with the run that resumes it; `agsel.runs.resume` says what may differ."""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

from datasets import Dataset
from torch import nn

from agsel.blocks import decoder_layers
from agsel.elements import mask_of
from agsel.elements.whole_weights import whole
from agsel.training.configuration import Configuration
from agsel.training.row_trainer import RowTrainer
from agsel.zero.parameters import global_numel, global_shape

ROWS_HASHED = 1000
NUMBERS_HASHED = 1000
"""Of each weight, about."""


def describe_settings(configuration: Configuration, rows: Dataset) -> dict[str, Any]:
    """What a resumed run is compared by before its model is loaded: plain values.

    Args:
        configuration: of the run.
        rows: to train on.
    """
    training = configuration.training
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    return {
        "stage": configuration.zero_stage,
        "dtype": configuration.dtype,
        "data": fingerprint_of_rows(rows),
        "examples per step": per_step,
        "seed": training.seed if training.data_seed is None else training.data_seed,
        "order": str(training.train_sampling_strategy),
        "method": configuration.selection.method,
        "blocks": _scope(configuration),
        "elements": _elements(configuration),
        "learning rate": training.learning_rate,
        "weight decay": training.weight_decay,
        "adam": f"betas {training.adam_beta1:g} {training.adam_beta2:g}, epsilon {training.adam_epsilon:g}",
        "ranks": training.world_size,
        "steps": training.max_steps if training.max_steps > 0 else f"those of {training.num_train_epochs:g} epochs",
        "schedule": _schedule(configuration),
        "clipping": training.max_grad_norm,
        "loss function": f"{training.loss_type} with label smoothing {training.label_smoothing_factor:g}",
        "noise": _noise(configuration),
        "adapters": _adapters(configuration),
        "folded adapters": configuration.selection.fold_adapters,
        "early choice": configuration.selection.choose_early,
        **_describe_choice(configuration.build_policy().settings()),
    }


def describe_trainer(trainer: RowTrainer, rows: Dataset) -> dict[str, Any]:
    """What a resumed run is compared by besides: its model, and its rows as tokens."""
    mask = mask_of(trainer.model)
    adapted = hasattr(trainer.model, "peft_config")
    below = {"base weights": fingerprint_of_weights(trainer.model, frozen=True)} if adapted else {}
    return below | {
        "model": _fingerprint_of_model(trainer),
        "dataset": fingerprint_of_rows(trainer.train_dataset.select_columns("input_ids")),
        "loss": trainer.learning.describe(rows),
        "chosen elements": f"{mask.numel:,} ({mask.checksum:08x})",
    }


def _elements(configuration: Configuration) -> str:
    settings = configuration.elements
    if settings.elements is None:
        return "none chosen"
    return f"{settings.elements} with density {settings.element_density:g} by {settings.element_samples:,} samples"


def _schedule(configuration: Configuration) -> str:
    training = configuration.training
    special = f" with {json.dumps(training.lr_scheduler_kwargs)}" if training.lr_scheduler_kwargs else ""
    return f"{training.lr_scheduler_type.value} after {training.warmup_steps:g} of warmup{special}"


def _adapters(configuration: Configuration) -> str:
    """What their shapes do not tell."""
    model = configuration.model
    if not model.use_peft:
        return "none"
    kind = "DoRA" if model.use_dora else "LoRA"
    scale = f"alpha {model.lora_alpha:g}" + " over the root of the rank" * model.use_rslora
    return f"{kind} of rank {model.lora_r} with {scale}"


def _noise(configuration: Configuration) -> str:
    dropout = configuration.model.lora_dropout if configuration.model.use_peft else 0.0
    return f"{configuration.training.neftune_noise_alpha or 0.0:g} on embeddings, dropout {dropout:g} in adapters"


def _scope(configuration: Configuration) -> str:
    lowest = configuration.selection.select_from
    return f"{configuration.taking_part} from {lowest:g}" if lowest else configuration.taking_part


def _describe_choice(settings: dict[str, Any]) -> dict[str, Any]:
    """What the policy has of these; of its other settings, `Policy.load_state_dict` says what changed."""
    known = {"fraction": "fraction", "selection seed": "seed"}
    return {name: settings[setting] for name, setting in known.items() if setting in settings}


def fingerprint_of_rows(rows: Dataset) -> str:
    """Of their number and the content of some, spread evenly: `ROWS_HASHED` to just under twice as many, or all."""
    step = max(1, len(rows) // ROWS_HASHED)
    digest = hashlib.sha256(str(len(rows)).encode())
    columns = rows.select(range(0, len(rows), step))[:]
    for row in zip(*columns.values(), strict=True):
        digest.update(str([*row]).encode())
    return f"{len(rows)} rows ({digest.hexdigest()[:8]})"


def fingerprint_of_weights(model: nn.Module, *, frozen: bool = False) -> str:
    """Of names, types, and some numbers of every weight of the layers, spread evenly. Every rank must call it.

    Args:
        model: of the run; ZeRO-3 may have partitioned it.
        frozen: only those that are, as below adapters.
    """
    digest = hashlib.sha256()
    for number, layer in enumerate(decoder_layers(model)):
        with whole(layer.parameters()):
            for name, weight in layer.named_parameters():
                if frozen and weight.requires_grad:
                    continue
                digest.update(json.dumps([number, name, str(weight.dtype), list(weight.shape)]).encode())
                step = max(1, weight.numel() // NUMBERS_HASHED)
                digest.update(weight.detach().flatten()[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _fingerprint_of_model(trainer: RowTrainer) -> str:
    shapes = [(name, tuple(global_shape(parameter))) for name, parameter in trainer.model.named_parameters()]
    numel = global_numel(trainer.model.parameters())
    return f"{type(trainer.model).__name__} of {numel:,} parameters ({zlib.crc32(str(shapes).encode()):08x})"
