"""`python -m cora` is the command `cora`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
