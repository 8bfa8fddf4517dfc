#!/usr/bin/env bash
# The launchers for real: Slurm, ssh and MPI on network namespaces of this machine, with tiny runs on its CPU. As root:
#   bash tools/cluster_test.sh [pytest arguments]
# Installs Debian packages that are not there. Tests end what they start; nothing runs on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
bash tools/debian_packages.sh slurm-wlm munge pdsh openssh-server openssh-client openmpi-bin libopenmpi3 mpich iproute2 \
  util-linux
# Two files side by side: a run waits more than it computes.
AGSEL_TEST_CLUSTER=required exec python -m pytest -p no:cacheprovider --numprocesses 2 --dist loadfile --cluster \
  tests/cluster "$@"
