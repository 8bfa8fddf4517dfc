"""How long a run takes to its first optimizer step, from any folder: starts `tools/bench/start.py`."""

import os
import sys
from pathlib import Path

repository = str(Path(__file__).resolve().parents[1])
path = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
command = [sys.executable, "-P", "-m", "tools.bench.start", *sys.argv[1:]]  # -P: not the tools where it is typed
os.execve(sys.executable, command, os.environ | {"PYTHONPATH": path})
