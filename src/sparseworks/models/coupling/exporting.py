"""The graph of a model on one batch, with marks on the sizes that its own numbers tell."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sparseworks.core.errors import ModelError
from sparseworks.models.calls import Arguments, Batch
from sparseworks.models.coupling.tracking import Tracking
from sparseworks.models.hooks import refresh
from sparseworks.models.modes import evaluating
from sparseworks.models.recurrence import relist

__all__ = ["exported"]


def exported(model: nn.Module, example: Batch, tracking: Tracking) -> torch.export.ExportedProgram:
    """The graph with marks on sizes; without them where a forward takes no int but a plain one.

    Raises:
        ModelError: torch.export cannot follow the model.
    """
    try:
        with tracking.of(model):
            return _exported(model, example)
    except ModelError:
        return _exported(model, example)


def _exported(model: nn.Module, example: Batch) -> torch.export.ExportedProgram:
    given = Arguments.of_batch(example)
    try:
        with _quiet(model), torch.no_grad():
            return torch.export.export(model, given.args, dict(given.kwargs), strict=False)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{type(model).__name__}: torch.export cannot follow the forward pass "
            f"({type(error).__name__}: {first[:300]}); channels can only be cut where it can"
        ) from error


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no key-value cache, no fused fast path; put back afterwards.

    The export leaves its own stand-ins in the lists that recurrent layers keep of their weights,
    and warns that it did: they take their parameters again.
    """
    configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    caches = [c for c in configs if getattr(c, "use_cache", False)]
    fast = torch.backends.mha.get_fastpath_enabled()
    for config in caches:
        config.use_cache = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The tensor attributes? .*_flat_weights")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config in caches:
            config.use_cache = True
        for module in model.modules():
            refresh(module)  # what hooks computed in the export has no values
        relist(model.modules())
