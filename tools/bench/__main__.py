"""`python -m tools.bench`."""

import sys

from tools.bench.command import main

main(sys.argv[1:])
