"""What the engine does beside forward, backward and step."""

from __future__ import annotations

import pytest
import torch

from tests.zero.scenario import Scenario, start_engine

pytestmark = pytest.mark.usefixtures("one_rank")


def test_no_gradient_outlives_zero_grad() -> None:
    engine, _ = start_engine(Scenario(stage=1, blocks="layers"))
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    assert trained
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    engine.zero_grad()
    assert [parameter.grad for parameter in trained] == [None] * len(trained)
    engine.destroy()
