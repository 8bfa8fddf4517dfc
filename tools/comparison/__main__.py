"""`python -m tools.comparison`."""

import sys

from tools.comparison.comparing import main

main(sys.argv[1:])
