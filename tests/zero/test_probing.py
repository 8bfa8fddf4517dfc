"""Probes give the model's own losses without the logits of all tokens, where the run has a loss that makes none.

Under Liger a forward leaves the logits out in training only, unless it is told to: probes tell it.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from agsel.adapters import scaled_adapters
from agsel.blocks import decoder_layers
from agsel.planning.rehearsal.ledger import Ledger
from agsel.policies import Probe
from agsel.zero.probing import losses_of


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.layers = nn.ModuleList([nn.Linear(1, 1)])

    def get_output_embeddings(self) -> nn.Module:
        return self


class LikeLiger(WithHead):
    def forward(self, rows: torch.Tensor, skip_logits: bool | None = None) -> Any:
        self.seen.append(skip_logits)
        return SimpleNamespace(loss=rows.float().mean())


class Plain(WithHead):
    def forward(self, rows: torch.Tensor) -> Any:
        self.seen.append(None)
        return SimpleNamespace(loss=rows.float().mean())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("kind", "told"), [(LikeLiger, True), (Plain, None)])
def test_probes_make_no_logits_where_the_model_can_do_without(kind: type[Any], told: bool | None) -> None:
    model, rows = kind(), torch.arange(12.0).view(4, 3)
    losses = losses_of((Probe(frozenset(), 1.0, 2),), model, model, (), (), {"rows": rows}, None)
    assert model.seen == [told]
    assert losses == [2.5], "of the first two rows"


VOCABULARY, LENGTH = 97, 12
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied head": ("llama", {"tie_word_embeddings": False}),
    "tied head": ("llama", {"tie_word_embeddings": True}),
    "capped logits": ("gemma2", {"final_logit_softcapping": 2.0}),
    "divided logits": ("granite", {"logits_scaling": 8.0}),
    "multiplied logits": ("cohere", {"logit_scale": 0.25}),
    "head with bias": ("phi", {"num_key_value_heads": 2}),
    "loss of the router": ("qwen2_moe", {"output_router_logits": True, "num_experts": 4, "moe_intermediate_size": 16}),
}


def with_fused_head(kind: str, changed: dict[str, Any], *, dora: bool = False) -> tuple[PeftModel, PeftModel]:
    """A small model with adapters and TRL's fused head, as a run has it, and the same one without the head."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | changed))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # the logits spread, as those of a model that has learnt
    fused = copy.deepcopy(plain)
    add_fused_lm_head(fused, outputs=("log_probs", "entropy", "is_top1"))
    adapters = LoraConfig(
        r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, use_dora=dora
    )
    torch.manual_seed(1)
    adapted = get_peft_model(fused, adapters)
    torch.manual_seed(1)
    return adapted, get_peft_model(plain, adapters)


def batch_of_trl(vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Rows of different lengths, whose first tokens are not learnt, with what TRL and the Trainer add."""
    ids = torch.randint(1, vocabulary, (5, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(LENGTH) < torch.tensor([12, 5, 9, 12, 3])[:, None]
    labels = ids.masked_fill(~mask | (torch.arange(LENGTH) < torch.tensor([1, 3, 6, 10, 0])[:, None]), -100)
    batch = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels, "use_cache": False}
    return batch | {"fused_lm_head": True, "num_items_in_batch": 7}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fused_head_gives_the_loss_of_the_model_itself(name: str, dora: bool) -> None:
    adapted, plain = with_fused_head(*ARCHITECTURES[name], dora=dora)
    batch, suppressed = batch_of_trl(), (frozenset({0}), frozenset({1}))
    probes = [Probe(half, 0.25, rows=4) for half in suppressed]
    losses = losses_of(probes, adapted, adapted, ("layers.0", "layers.1"), (), batch, None)
    inputs = {key: batch[key][:4] for key in ("input_ids", "attention_mask", "labels")}
    for half, loss in zip(suppressed, losses, strict=True):
        layers = [decoder_layers(plain)[index] for index in half]
        with torch.no_grad(), scaled_adapters(layers, 0.25):
            assert loss == pytest.approx(plain.eval()(**inputs).loss.item(), rel=2e-6)
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.usefixtures("one_rank")
def test_a_probe_with_a_fused_head_never_holds_the_logits_of_all_tokens() -> None:
    vocabulary = 150_000  # several tiles of TRL
    adapted, _ = with_fused_head("llama", {"vocab_size": vocabulary})
    ledger = Ledger()
    ledger.ignore(adapted.parameters())
    with ledger:
        losses_of([Probe(frozenset(), 1.0, 4)], adapted, adapted, (), (), batch_of_trl(vocabulary), None)
    logits = 4 * LENGTH * vocabulary * torch.float32.itemsize
    assert 0 < ledger.peak.total() < logits
