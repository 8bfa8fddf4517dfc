"""launch/evaluate.py on two GPUs finds what it finds on one, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed import launch
from tests.test_evaluate import alone, arguments
from tools import arithmetic


def test_two_gpus_find_what_one_finds(tmp_path: Path) -> None:
    arithmetic.write_model(tmp_path / "model", seed=5)
    data = arithmetic.draw_data(seed=9)["two_step_heldout"][:100]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    outputs = [tmp_path / "one.json", tmp_path / "two.json"]
    words = [arguments(tmp_path / "model", tmp_path / "rows.jsonl", output) for output in outputs]
    by_one, by_two = alone(*words[0]), launch("launch/evaluate.py", *words[1])
    assert by_one.returncode == 0, by_one.stderr
    assert by_two.returncode == 0, by_two.stdout
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert outputs[0].with_suffix(".jsonl").read_bytes() == outputs[1].with_suffix(".jsonl").read_bytes()
