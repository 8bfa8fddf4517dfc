#!/usr/bin/env bash
# All checks: lint, types, CPU tests. Sets everything up on a machine with Python and pip; quick the second time.
#   bash tools/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
ruff check .
ruff format --check .
mypy
# Two files side by side: a run waits more than it computes while it starts.
exec python -m pytest --numprocesses 2 --dist loadfile "$@"
