"""`tools/debian_packages.sh` on a machine where it can install nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY

SCRIPT = REPOSITORY / "tools" / "debian_packages.sh"


@pytest.mark.parametrize("user", ["0", "1000"])
def test_the_reason_is_said_at_once(user: str, tmp_path: Path) -> None:
    """As root or another user, without Debian's programs and `sudo`."""
    for name in ("grep", "env", "timeout"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    for name, text in (("id", f"echo {user}"), ("install", "cat > /dev/null"), ("rm", ":")):
        (tmp_path / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = [str(shutil.which("bash")), SCRIPT, "slurm-wlm", "munge"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "cannot install slurm-wlm munge: needs Debian or the like, root or sudo" in done.stderr
