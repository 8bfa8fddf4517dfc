#!/usr/bin/env bash
# Run the GPU tests on a machine with at least two GPUs: bash tools/gpu_test.sh [pytest arguments]
# Uses the current Python environment, which must hold torch with CUDA and agsel's dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec python3 -m pytest tests/gpu -p no:cacheprovider "$@"
