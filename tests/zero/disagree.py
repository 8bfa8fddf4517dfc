"""A run in which one rank's policy is changed and nobody catches the error."""

import deepspeed
import torch

from tests.zero.scenario import Scenario, start_engine, train_step

deepspeed.init_distributed(dist_backend="gloo")
engine, selection = start_engine(Scenario(stage=2))
for step in range(10):
    if step == 2 and torch.distributed.get_rank() == 1:
        selection.policy.counts[0] += 1
    train_step(engine, step, accumulation=1)
