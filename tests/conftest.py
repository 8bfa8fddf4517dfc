"""Tests marked `slow` or `cluster` run only when asked for; a process group of one rank for tests without a launch."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before it is read: tests must not wait for a hub

from collections.abc import Iterator

import pytest
import torch
from torch import distributed

from tests.distributed import OF_A_RANK, free_port

torch.set_num_threads(1)  # more would wait for each other, busily, where other tests use the cores
OF_A_RUN = (*OF_A_RANK, "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "ACCELERATE_USE_DEEPSPEED")
"""Variables by which a launcher or a library tells a process that it is a rank."""
ASKED_FOR = {"slow": "run it with `bash tools/test.sh --slow`", "cluster": "run it with `bash tools/cluster_test.sh`"}
"""How to ask for the tests with a marker."""


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker in ASKED_FOR:
        parser.addoption(f"--{marker}", action="store_true", help=f"run the tests marked {marker} too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, how in ASKED_FOR.items():
        if not config.getoption(f"--{marker}"):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"{marker}: {how}"))


def of_a_run() -> dict[str, str]:
    return {name: os.environ[name] for name in OF_A_RUN if name in os.environ}


BEFORE_ALL_TESTS = of_a_run()


@pytest.fixture(autouse=True)
def no_rank_left_behind() -> Iterator[None]:
    """A test that makes a rank of this process says so by failing, and not all that come after it."""
    yield
    left = of_a_run()
    for name in OF_A_RUN:
        os.environ.pop(name, None)
    os.environ.update(BEFORE_ALL_TESTS)
    assert left == BEFORE_ALL_TESTS, "use the fixture untouched_environment"


@pytest.fixture
def untouched_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def one_rank(untouched_environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import deepspeed

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(deepspeed.utils.groups, "_WORLD_GROUP", None)  # of the test before, whose group is destroyed
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO-3 replaces it for ever
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    deepspeed.init_distributed("gloo", verbose=False)
    yield
    distributed.destroy_process_group()
