"""Work in a forked process, which has everything loaded that this one has.

The pool of threads of this process does not live on in a fork, but OpenMP there waits for it: a
fork works with one thread, as the workers of torch's DataLoader do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["forked"]


def forked(work: Callable[[], Any]) -> int:
    """The id of a process that does it, quietly, and ends with what it returns (none: 0), or with
    1 for an exception."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = int(work() or 0)
    finally:
        os._exit(code)
