"""The model that all methods train: random weights, and the kernels asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

import agsel
from agsel.planning.shapes import model_config
from tools.bench.configurations import Configuration
from tools.bench.device import device

OUTPUTS_OF_TRL = ("log_probs", "entropy", "is_top1")
"""Of the fused head, as its trainer asks for them."""


def build_model(configuration: Configuration) -> PreTrainedModel:
    """The model with random weights, equal on all ranks, bf16, made on the device; with the kernels asked for."""
    config = model_config(configuration.model)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    if configuration.liger != "none":
        use_liger(model, configuration.liger)
    if configuration.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # else every backward reaches the embedding, through frozen layers too
    if configuration.compile:
        agsel.compile_layers(model)
    return model


def use_liger(model: PreTrainedModel, kernels: str) -> None:
    """Liger's kernels in the layers or not, and the fused loss of Liger or TRL; see `configurations.LIGER`."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    in_layers = dict.fromkeys(("rope", "rms_norm", "swiglu"), kernels != "loss")
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    apply(model=model, fused_linear_cross_entropy=kernels != "trl", cross_entropy=False, **in_layers)
    if kernels == "trl":
        add_fused_lm_head(model, outputs=OUTPUTS_OF_TRL)
        model.forward = partial(model.forward, fused_lm_head=True)


@contextmanager
def restored_modules(configuration: Configuration) -> Iterator[None]:
    """Put back what is replaced for the whole process: Liger replaces a model's functions, ZeRO-3 one of torch's."""
    model_class = AutoModelForCausalLM._model_mapping[type(model_config(configuration.model))]
    modules = [torch.nn.functional, sys.modules[model_class.__module__]]
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            vars(module).update(names)
