"""``python -m synapse_sticky``, for where the command ``synapse-sticky`` is not on the path."""

import sys

from synapse_sticky.cli import main

if __name__ == "__main__":
    sys.exit(main())
