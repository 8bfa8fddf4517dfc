"""Speed and memory of training methods side by side, from any folder: starts `tools/bench/`."""

import os
import sys
from pathlib import Path

repository = str(Path(__file__).resolve().parents[1])
path = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
command = [sys.executable, "-P", "-m", "tools.bench", *sys.argv[1:]]  # -P: tools is this one, not one where it is typed
os.execve(sys.executable, command, os.environ | {"PYTHONPATH": path})
