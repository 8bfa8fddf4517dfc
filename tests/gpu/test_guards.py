"""SuperOffload starts on CUDA only: refused there too, on a real engine."""

from __future__ import annotations

from pathlib import Path

from tests.cases import launch_cases


def test_super_offload_is_refused(tmp_path: Path) -> None:
    for rank in launch_cases("tests/gpu/super_offload_ranks.py", tmp_path):
        assert "offload_optimizer.super_offload is not supported" in rank["super_offload"]
