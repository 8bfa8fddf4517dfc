"""Start a script on several ranks of this host, and end all when one fails, as the `deepspeed` command does.

    python tests/start_ranks.py RANKS PORT SCRIPT ARGUMENT ...

It imports nothing that takes seconds: it is for scripts which are not about their launcher.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

TICK = 0.05
"""Seconds between two looks at the ranks."""


def main(ranks: str, port: str, *command: str) -> int:
    """Return the exit code of the ranks: 0, or that of the first one found to have failed."""
    common = os.environ | {"WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen([sys.executable, "-u", *command], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(int(ranks))
    ]
    while None in (codes := [process.poll() for process in processes]) and not any(codes):
        time.sleep(TICK)
    for process in processes:
        process.kill()
        process.wait()
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
