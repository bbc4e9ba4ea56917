"""Several processes of one command: `torchrun --nproc-per-node N -m sparseworks prune ...`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

__all__ = ["process_group"]

_PATIENCE = timedelta(hours=12)  # the other ranks wait while one solves, measures or writes


@contextmanager
def process_group(*, training: bool = False) -> Iterator[Any]:
    """The group of the processes that torchrun started, or None where this one is alone.

    Only rank 0 prints.

    Args:
        training: gradients go between devices too (NCCL on CUDA), not objects and weights alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        yield None
        return
    import torch
    from torch import distributed

    own = not distributed.is_initialized()
    if own:
        backend = "cpu:gloo,cuda:nccl" if training and torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=_PATIENCE)
    shown = sys.stdout
    try:
        if distributed.get_rank() != 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed below
        yield distributed.group.WORLD
        distributed.barrier()
    finally:
        if sys.stdout is not shown:
            sys.stdout.close()
            sys.stdout = shown
        if own:
            distributed.destroy_process_group()
