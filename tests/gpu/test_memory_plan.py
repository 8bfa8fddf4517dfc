"""The memory plan against what two GPUs really use: rows of tools/bench.py, each within 10 %."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from agsel.blocks import find_blocks
from agsel.planning.memory import Planner, meta_model, spread_evenly, train_elements
from agsel.planning.rehearsal import Rehearsal, Step, Workload, ZeroSettings
from agsel.planning.shapes import MODEL_SHAPES
from agsel.policies import blocks_of_fraction
from tests.distributed import REPOSITORY, environment
from tools.bench.compared_methods import METHODS
from tools.bench.starters import with_adapters

TOLERANCE = 0.1
PLAN = """
- {models: qwen2.5-0.5b, stages: 2, methods: [full, bound, exploit, explore], shapes: 8x512, liger: all}
- {models: qwen2.5-0.5b, stages: 2, methods: [full, exploit], shapes: 8x512}
- {models: qwen2.5-0.5b, stages: 2, methods: exploit, shapes: 8x512, liger: loss, checkpointing: on}
- {models: qwen2.5-0.5b, stages: 2, methods: exploit, shapes: 8x512, liger: loss, compile: on}
- {models: qwen2.5-0.5b, stages: [1, 2], methods: explore, shapes: 8x512, liger: loss, accumulation: 2}
- {models: qwen2.5-0.5b, stages: 3, methods: [full, exploit, explore], shapes: 8x512, liger: loss}
- {models: llama-3.2-1b, stages: 2, methods: [exploit, explore], shapes: 8x512, liger: loss}
- {models: qwen2.5-0.5b, stages: 2, shapes: 8x512, liger: loss, methods: [lisa, agsel-badam]}
- {models: qwen2.5-0.5b, stages: 2, shapes: 8x512, liger: loss, methods: [exploit-lora-256, exploit-lora-256-folded]}
- {models: qwen2.5-0.5b, stages: 2, shapes: 8x512, liger: loss, methods: ist-lora-256}
- {models: qwen2.5-0.5b, stages: [2, 3], shapes: 8x512, liger: loss, methods: [elements, exploit-elements]}
"""


def predicted(row: dict[str, Any]) -> int:
    """The peak of a row of tools/bench.py, in bytes.

    Raises:
        ValueError: the plan does not cover the row's method.
    """
    shipped = json.loads((REPOSITORY / "ds_configs" / f"zero{row['stage']}.json").read_text())
    work = Workload(
        zero=ZeroSettings.of(shipped["zero_optimization"]),
        ranks=row["ranks"],
        micro_batch=row["micro_batch"],
        sequence=row["sequence"],
        accumulation=row["accumulation"],
        checkpointing=row["checkpointing"],
        compiled=row["compile"],
        liger_layers=row["liger"] == "all",
        loss="trl" if row["method"] == "trainer" else "transformers" if row["liger"] == "none" else "liger",
    )
    model = meta_model(MODEL_SHAPES[row["model"]]())
    found = find_blocks(model)
    layers = [block.parameters for block in found if block.is_layer]
    count = blocks_of_fraction(row["fraction"], len(layers))
    if row["method"] == "bound":
        always = frozenset(range(count))
        groups = [layers[index] for index in spread_evenly(len(layers), count)]
        return (
            Rehearsal(model, work)
            .run(Step(groups=groups, trainable=always, updated=always, resident=always, stock=True))
            .total
        )
    method = METHODS[row["method"]]
    if method.lora_rank is not None:
        model = with_adapters(model, method.lora_rank, found)
    elif method.reads_density:
        train_elements(model, row["density"])
    policy = method.policy(row["fraction"]) if method.policy else None
    blocks = policy.takes_part if policy else "layers"
    planner = Planner(
        model, work, blocks=blocks, offload_states=row["offload_states"], policy=policy, fold_adapters=method.folds
    )
    count = policy.started(planner.infos).blocks_per_step if policy else count
    plan = planner.plan(count, method.kinds_of_steps)
    return max(peak.total for peak in plan.steps.values())


def test_the_plan_is_within_ten_percent_of_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    command = [sys.executable, "tools/bench.py", "--plan", str(tmp_path / "plan.yaml"), "--output", str(tmp_path)]
    subprocess.run([*command, "--steps", "8", "--warmup", "3"], cwd=REPOSITORY, env=environment(), check=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert not [row["error"] for row in rows if row["error"]]
    ratios = {json.dumps(row)[:200]: predicted(row) / row["peak_bytes"] for row in rows}
    assert {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > TOLERANCE} == {}
