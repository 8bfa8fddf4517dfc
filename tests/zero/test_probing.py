"""Under Liger a forward leaves the logits out in training only, unless it is told to: probes tell it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

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
