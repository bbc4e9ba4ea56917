"""Interrupting a call somewhere in its middle, and all of a model that it could have changed."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparseworks as sw

PACKAGE = str(Path(sw.__file__).parent)


def bytes_of(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


def picture(model: nn.Module) -> dict[str, Any]:
    """All of a model that a call could change, as plain values and copies."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "modules": [
            (n, type(m), m.training, [len(getattr(m, h)) for h in hooks], sorted(vars(m)))
            for n, m in model.named_modules()
        ],
        "tensors": [
            (
                n,
                t.requires_grad,
                t.shape,
                t.detach().contiguous().view(-1).view(torch.uint8).tolist(),
            )
            for n, t in tensors
        ],
        "tensor hooks": [
            (n, len(t._backward_hooks or ()), len(t._post_accumulate_grad_hooks or ()))
            for n, t in model.named_parameters()
        ],
        "masks": None if (r := sw.masks(model)) is None else {n: r[n].tolist() for n in r},
    }


class Fault(BaseException):
    """What a call is interrupted by, as by Ctrl-C."""


@contextmanager
def calls_counted(fail_at: int | None = None):
    """Count the calls of functions of the package; one of them fails instead of being made.

    Cleaning up is left alone, as no code can be undone by code that fails as well.
    """
    cleaning = {"__exit__", "restore", "undo", "remove", "_release", "_unparametrize"}
    seen = [0]

    def look(frame: Any, event: str, argument: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        seen[0] += 1
        if fail_at is None or seen[0] < fail_at:
            return
        above = frame
        while above is not None:
            if above.f_code.co_name in cleaning:
                return
            above = above.f_back
        sys.setprofile(None)
        raise Fault

    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(None)
