"""The model with a trained adapter added to its weights, beside the adapter alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from trl.trainer.utils import create_model_from_path

from agsel.training.export import complete_or_absent
from agsel.zero.consensus import first_rank_does


def merge_adapter(trainer: Trainer, name_or_path: str, adapter: Path, folder: Path, group: Any = None) -> None:
    """Load the base model once more and add the exported adapter to it. Every rank must call it; the first one works.

    Args:
        trainer: after training; its arguments say how the base model is loaded.
        name_or_path: of the base model.
        adapter: folder of `agsel.training.export.export_model`.
        folder: `from_pretrained` loads it; complete or absent.
        group: process group of all ranks, by default the run's own. The others wait in it for the first.

    Raises:
        RunError: on every rank; the disk does not take it.
    """
    first_rank_does(partial(_merge, trainer, name_or_path, adapter, folder), group)


def _merge(trainer: Trainer, name_or_path: str, adapter: Path, folder: Path) -> None:
    with _whole_weights(trainer):
        base = create_model_from_path(name_or_path, **(trainer.args.model_init_kwargs or {}) | {"device_map": "cpu"})
        # There are more, if a template of another model has brought some.
        tokens = trainer.model.config.get_text_config().vocab_size
        if tokens != base.config.get_text_config().vocab_size:
            base.resize_token_embeddings(tokens)
        adapted = PeftModel.from_pretrained(base, str(adapter))
        _untie_adapted(base)
        merged = adapted.merge_and_unload()
    merged.generation_config = trainer.model.generation_config  # which `prepare_export` has mended
    with complete_or_absent(folder) as staged:
        merged.save_pretrained(staged)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(staged)


def _untie_adapted(model: PreTrainedModel) -> None:
    """Give a head that is tied to the embedding weights of its own, if one of the two is to be added an adapter."""
    text_config = model.config.get_text_config()
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    if not text_config.tie_word_embeddings or not any(isinstance(table, LoraLayer) for table in tables):
        return
    head = tables[1].get_base_layer() if isinstance(tables[1], LoraLayer) else tables[1]
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = text_config.tie_word_embeddings = False


@contextmanager
def _whole_weights(trainer: Trainer) -> Iterator[None]:
    """While inside, transformers does not divide what it loads among the ranks, as it does for ZeRO-3."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(trainer.args.hf_deepspeed_config)
