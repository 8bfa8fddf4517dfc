"""By what a run can be told from others in a file of many: the code, the machine, and what its files hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import agsel
from agsel.training.environment import describe_environment
from tools.comparison.plan import Plan

PACKAGES = ("torch", "deepspeed", "transformers", "trl", "peft")
LETTERS = 12
"""Of a digest in hexadecimal digits."""


def contents_of(plan: Plan) -> dict[str, str]:
    """Digests of what the plan names: weights, rows and text. What is no file or folder here has none.

    Words of a command line may name others: with them there are none.
    """
    if plan.words:
        return {}
    parts = {part: getattr(plan, part) for part in plan.parts}
    named = {
        "model": plan.shared.get("model_name_or_path"),
        "training data": plan.shared.get("dataset_name"),
        **{f"{part} part": flags.get("dataset", flags.get("dataset_name")) for part, flags in parts.items()},
        "forgetting": plan.forgetting,
    }
    digests = {what: _digest(Path(name)) for what, name in named.items() if name is not None}
    return {what: digest for what, digest in digests.items() if digest is not None}


@cache
def _digest(path: Path) -> str | None:
    """Of a file, or of the weights in a folder."""
    paths = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return _digest_of(paths) if paths else None


def _digest_of(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:LETTERS]


def describe_origin(plan: Plan, *, on_gpu: bool) -> dict[str, Any]:
    """Where and with what a run takes place now: plain values, none of them a path.

    `code` is a digest of agsel's sources, which are the same where there is no Git.
    """
    here = describe_environment(plan.gpus_per_run)
    return {
        "date": str(datetime.now(UTC).date()),
        "commit": here["commit"],
        "code": _digest_of(sorted(Path(agsel.__file__).parent.rglob("*.py"))),
        "device": here["device"] if on_gpu else "CPU",
        "gpus_per_run": plan.gpus_per_run,
        "runs_per_gpu": plan.runs_per_gpu,
        "python": here["python"],
        "packages": {name: here["packages"].get(name) for name in PACKAGES},
    }


def said_of_origins(origins: list[Mapping[str, Any]]) -> str:
    """Dates, hardware, code and versions of runs, in a line."""
    return ", ".join(_said(origins)) + "." if origins else "No runs."


def _said(origins: list[Mapping[str, Any]]) -> Iterator[str]:
    dates = sorted(origin["date"] for origin in origins)
    yield dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    yield _alternatives(f"{origin['gpus_per_run']} x {origin['device']} a run" for origin in origins)
    yield _alternatives(f"up to {origin['runs_per_gpu']} runs at once on each" for origin in origins)
    yield "commit " + _alternatives(origin["commit"] or f"of code {origin['code']}" for origin in origins)
    for package in PACKAGES:
        yield f"{package} " + _alternatives(str(origin["packages"][package]) for origin in origins)


def _alternatives(texts: Iterator[str]) -> str:
    return " / ".join(dict.fromkeys(texts))
