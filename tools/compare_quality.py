"""What methods learn and what they cost, side by side, from any folder: starts `tools/comparison/`."""

import os
import sys
from pathlib import Path

repository = str(Path(__file__).resolve().parents[1])
path = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
command = [sys.executable, "-P", "-m", "tools.comparison", *sys.argv[1:]]  # -P: tools is this one
os.execve(sys.executable, command, os.environ | {"PYTHONPATH": path})
