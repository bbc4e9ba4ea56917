"""`python -m sparseworks.cli`."""

import sys

from sparseworks.cli import main

sys.exit(main())
