"""`launch/train.py` on the CPU that plans its memory for GPUs of 2 GB: deepspeed tests/memory_worker.py SETTINGS..."""

import sys
from types import SimpleNamespace
from typing import Any

import torch

from agsel import train

if __name__ == "__main__":
    plan_of_run = train.plan_of_run

    def plan_for_gpus(configuration: Any, *arguments: Any) -> Any:
        torch.cuda.get_device_properties = lambda _: SimpleNamespace(total_memory=2 * 10**9)
        configuration.training.use_cpu = False
        plan = plan_of_run(configuration, *arguments)
        configuration.training.use_cpu = True
        return plan

    train.plan_of_run = plan_for_gpus
    train.main(sys.argv[1:])
