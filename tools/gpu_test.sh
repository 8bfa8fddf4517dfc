#!/usr/bin/env bash
# Run the GPU tests on a machine with at least two GPUs: [AGSEL_TEST_RANKS=4] bash tools/gpu_test.sh [pytest arguments]
# With AGSEL_TEST_SHARED_GPU=1 one GPU is enough: all ranks share it, and a test may take longer.
# Uses the current Python environment, which must hold torch with CUDA and agsel's dependencies. The files run side by
# side: most of their time is the start of processes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export AGSEL_TEST_DEVICE=cuda PYTEST_TIMEOUT=1500
logs=$(mktemp -d)
declare -A running
for file in tests/gpu/test_*.py; do
  python3 -m pytest "$file" --slow -p no:cacheprovider "$@" > "$logs/$(basename "$file")" 2>&1 &
  running[$file]=$!
done
failed=0
for file in "${!running[@]}"; do
  wait "${running[$file]}" || failed=1
  echo "== $file"
  cat "$logs/$(basename "$file")"
done
rm -r "$logs"
exit $failed
