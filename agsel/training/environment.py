"""Where a run took place: versions, devices, code and command, in `environment.json` of its folder."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from agsel.replacing import replace_file

PACKAGES = ("agsel", "torch", "deepspeed", "transformers", "trl", "peft", "accelerate", "datasets", "liger-kernel")
FILE = "environment.json"


def describe_environment(ranks: int) -> dict[str, Any]:
    """Of this process, and how many ranks there are. Code is the Git commit of the working directory, if it has one."""
    on_gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(_without_secrets(sys.argv)),
        "commit": _commit(),
        "host": socket.gethostname(),
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "cuda": torch.version.cuda if on_gpu else None,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def write_environment(environment: dict[str, Any], folder: Path) -> None:
    """Into the run folder."""
    replace_file(folder / FILE, json.dumps(environment, indent=2) + "\n")


def _without_secrets(words: Sequence[str]) -> list[str]:
    """A token of the hub is nobody else's business. The parser also takes dashes for underscores."""
    hidden = [re.fullmatch(r"--.*[-_]token", before) for before in ["", *words]]
    return [
        "***" if is_hidden else re.sub(r"^(--[\w-]*[-_]token=).*", r"\1***", word, flags=re.DOTALL)
        for word, is_hidden in zip(words, hidden, strict=False)
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """For example `1a2b3c4`, or `1a2b3c4, with changes`."""
    commit = _git("rev-parse", "--short", "HEAD")
    return f"{commit}, with changes" if commit and _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
