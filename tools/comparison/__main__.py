"""`python -m tools.comparison`."""

import sys

try:
    from tools.comparison.comparing import main
except ImportError as error:
    sys.exit(f"agsel: error: {error}, which comparisons need: pip install 'agsel[bench]'")

main(sys.argv[1:])
