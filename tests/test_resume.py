"""2N steps equal N steps, the end of the process, and N steps more: bit for bit, through `launch/train.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from agsel.runs.checkpoints import Manifest
from tests.distributed import REPOSITORY, run_ranks
from tests.tiny_run import save_model, save_rows

ON_GPU = torch.cuda.is_available()
STEPS = 12
CUTS = (3, 4, 10)
"""In the middle of epoch 1 while exploring, at its end, and in the middle of epoch 3 after exploring."""
NOT_COMPARED = ("training_args.bin",)
METHODS: dict[str, dict[str, Any]] = {
    "adagradselect": {"select_fraction": 0.5, "explore_steps": 6, "epsilon_end": 0.5},
    "lisa": {"select_fraction": 0.5, "select_every": 4},
    "badam": {"select_every": 4},
    "grass": {"select_fraction": 0.5, "select_every": 2, "probe_steps": 2, "refresh_every": 8},
    "ist": {
        **{"select_fraction": 0.5, "use_peft": True, "lora_target_modules": "all-linear"},
        "gradient_checkpointing": False,
    },
    "elements": {
        **{"method": "adagradselect", "select_fraction": 0.5, "explore_steps": 6, "epsilon_end": 0.5},
        **{"elements": "gallop", "element_density": 0.1, "element_samples": 16},
    },
}
"""Their settings. Cuts lie in the middle of a turn, between probing and training, and where IST asks for losses."""
RUNS = [
    *((stage, "adagradselect") for stage in (1, 2, 3)),
    (3, "lisa"),
    (3, "badam"),
    (2, "badam"),
    (3, "grass"),
    (2, "ist"),
    (2, "elements"),
    (3, "elements"),
]
UPDATES_BEFORE_THE_FIRST_CUT = {"AdaGradSelect": 3 * 2, "Lisa": 3 * (3 + 2), "BAdam": 3, "Grass": 2, "Ist": 3 * 2}
"""Blocks by steps; those of GRASS that only measure update none."""
FAST = (3, "adagradselect")


def train_and_resume(folder: Path, stage: int, method: str) -> Path:
    """Three epochs of four steps, of two micro-batches each; dropout, so that random numbers matter."""
    model = save_model(folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    save_rows(folder / "rows.jsonl", 32)
    zero = json.loads((REPOSITORY / "ds_configs" / f"zero{stage}.json").read_text())
    if stage == 3:
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero.json").write_text(json.dumps(zero))
    chosen = {
        "deepspeed": folder / "zero.json",
        "bf16": ON_GPU,
        "attn_implementation": "eager",
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "method": method,
        **METHODS[method],
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
    }
    arguments = [str(text) for name, value in chosen.items() for text in (f"--{name}", value)]
    run_ranks("tests/resume_worker.py", folder, ",".join(map(str, CUTS)), *arguments)
    return folder


@pytest.fixture(
    scope="module",
    params=[pytest.param(run, marks=[] if run == FAST else pytest.mark.slow, id=f"{run[0]}-{run[1]}") for run in RUNS],
)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_and_resume(tmp_path_factory.mktemp("resume"), *request.param)


def test_a_resumed_run_ends_as_the_unbroken_one(runs: Path) -> None:
    """Every tensor, number and random state of the last checkpoint, of all ranks; three resumes in a row."""
    whole = runs / "whole" / f"checkpoint-{STEPS}"
    names = [name for name in Manifest.read(whole).files if name not in NOT_COMPARED]
    assert sum(name.endswith("optim_states.pt") for name in names) == 2
    assert sum(name.startswith("rng_state") for name in names) == 2
    for cut in CUTS:
        resumed = runs / f"after-{cut}" / f"checkpoint-{STEPS}"
        for name in names:
            assert differences(content(whole / name), content(resumed / name)) == [], f"{name} after step {cut}"


def test_the_resumed_run_saw_the_same_rows(runs: Path) -> None:
    """Losses and selections of every step after the cut; the learning rate and the number of tokens, too."""
    for cut in CUTS:
        logged = [entry for entry in history(runs / f"after-{cut}") if entry["step"] > cut]
        assert logged == [entry for entry in history(runs / "whole") if entry["step"] > cut]
        assert [entry["step"] for entry in logged] == list(range(cut + 1, STEPS + 1))


def test_the_cuts_were_hard(runs: Path) -> None:
    """Dropout and the selection draw random numbers; the blocks had not been trained alike at the first cut."""
    entries = history(runs / "whole")
    assert len({entry["loss"] for entry in entries}) == STEPS
    counts = [counts_at(runs / "whole" / f"checkpoint-{step}") for step in (CUTS[0], STEPS)]
    assert len(set(counts[0])) > 1
    assert (
        sum(counts[0])
        == UPDATES_BEFORE_THE_FIRST_CUT[json.loads((runs / "whole" / "selection.json").read_text())["method"]]
    )
    assert counts[0] != counts[1]


def counts_at(checkpoint: Path) -> list[int]:
    state = torch.load(next(checkpoint.rglob("*model_states.pt")), weights_only=False)
    return state["agsel"]["policy"]["counts"]


def history(run: Path) -> list[dict[str, Any]]:
    state = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    keys = ("step", "loss", "learning_rate", "grad_norm", "epoch", "num_tokens")
    return [{key: entry[key] for key in keys} for entry in state["log_history"] if "loss" in entry]


def content(path: Path) -> Any:
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, map_location="cpu", weights_only=False)
    if path.name == "trainer_state.json":
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "log_history"}
    return path.read_bytes()


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Paths at which two nested structures differ."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where} keys"]
        return [path for key in one for path in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where} length"]
        return [
            path for i, pair in enumerate(zip(one, other, strict=True)) for path in differences(*pair, f"{where}/{i}")
        ]
    if hasattr(one, "tobytes"):
        return [] if one.tobytes() == other.tobytes() else [where]
    return [] if one == other or repr(one) == repr(other) else [where]
