"""`python -m sparseworks`, also under `torchrun -m sparseworks`."""

import sys

from sparseworks.cli import main

if __name__ == "__main__":
    sys.exit(main())
