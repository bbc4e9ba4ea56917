"""What calibration shows about the inputs of linear layers, on the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.core.evidence import Collector
from sparseworks.core.types import Progress
from sparseworks.models.active import Gate
from sparseworks.models.calibration import Calibration, replay, stream
from sparseworks.models.calls import Batch
from sparseworks.models.matrix import View

__all__ = ["Family", "Job", "Reader", "quantile"]

Family = Callable[[float], Gate]
"""The gate of one layer for every sparsity in [0, 1)."""


class _Tokens(Collector):
    """The first inputs themselves, `[tokens, in]`."""

    limit = 4096

    def __init__(self, groups: int, inputs: int, device: torch.device | str = "cpu") -> None:
        super().__init__(groups, inputs, device)
        self.parts: list[Tensor] = []
        self.count = 0

    def _add(self, inputs: Tensor, group: int) -> None:
        taken = inputs[: self.limit - self.count]
        if taken.shape[0]:
            self.parts.append(taken.to(self.device, copy=True))
            self.count += taken.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.parts)


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer, or several that read the same inputs, as a method sees them.

    Attributes:
        names: of the modules.
        weight: `[outputs, in]` fp32, below each other.
        inputs: `[tokens, in]` fp32, what calibration fed in.
    """

    names: tuple[str, ...]
    weight: Tensor
    inputs: Tensor


@dataclass
class Job:
    """One call of `sparse_activations`.

    Attributes:
        model: in evaluation mode while it is calibrated.
        views: the linear layers that may take part.
        batches: of calibration data.
        sparsity: share of the entries that are set to 0.
        tokens: of calibration data that are looked at in each layer.
    """

    model: nn.Module
    views: Sequence[View]
    batches: Sequence[Batch]
    sparsity: float
    tokens: int = 4096
    progress: Progress | None = None
    _shared: list[tuple[str, ...]] | None = field(default=None, repr=False)

    def each(self, together: bool, visit: Callable[[Reader], None],
             wanted: Callable[[str], bool] = lambda name: True) -> None:  # fmt: skip
        """Visit layers with their inputs, block by block.

        Args:
            together: those that read the same inputs as one.
            wanted: by module name.

        Raises:
            DataError: the data reaches none of them.
        """
        views = [v for v in self.views if wanted(v.module_name)]
        by_name = {v.module_name: v for v in views}
        groups = [tuple(n for n in g if n in by_name) for g in self.shared()]
        if not together:
            groups = [(n,) for g in groups for n in g]
        leader = {g[0]: g for g in groups if g}
        reached = 0

        def make(view: View, device: torch.device) -> list[Collector]:
            if view.module_name not in leader:
                return []
            found = _Tokens(1, view.shape[1], device)
            found.limit = self.tokens
            return [found]

        def see(view: View, collectors: Sequence[Collector]) -> None:
            nonlocal reached
            names = leader.get(view.module_name)
            if names is None:
                return
            (found,) = collectors
            assert isinstance(found, _Tokens)
            if not found.parts:
                return
            reached += 1
            weight = torch.cat([by_name[n].matrix().float() for n in names])
            visit(Reader(names, weight, torch.cat(found.parts)))

        plan = Calibration(self.batches, propagate="dense", progress=self.progress)
        with torch.no_grad():
            stream(self.model, views, plan, make, see)
        if not reached:
            raise DataError("the calibration data reached none of the linear layers")

    def shared(self) -> list[tuple[str, ...]]:
        """Names of layers that read the very same tensor, in the order of use."""
        if self._shared is not None:
            return self._shared
        seen: list[tuple[Tensor, list[str]]] = []

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                known = next((names for x, names in seen if x is args[0]), None)
                if known is None:
                    seen.append((args[0], [name]))
                elif name not in known:
                    known.append(name)

            return hook

        self.watch({v.module_name: note(v.module_name) for v in self.views}, {}, self.batches[:1])
        found: list[tuple[str, ...]] = []
        for _, names in seen:  # a layer that is used twice keeps its first place
            new = tuple(n for n in names if all(n not in g for g in found))
            found += [new] if new else []
        self._shared = found
        return found

    def watch(self, before: Mapping[str, Any], after: Mapping[str, Any],
              batches: Sequence[Batch] | None = None) -> None:  # fmt: skip
        """Run the data through the model with hooks on modules, by name."""
        modules = dict(self.model.named_modules())
        hooks = chain(
            (modules[n].register_forward_pre_hook(h) for n, h in before.items()),
            (modules[n].register_forward_hook(h) for n, h in after.items()),
        )
        replay(self.model, self.batches if batches is None else batches, hooks)


def quantile(values: Tensor, share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed; -1 for a share of 0."""
    if not 0 <= share <= 1:
        raise InvalidArgument(f"a share of {share} is not in [0, 1]")
    count = round(share * values.numel())
    if count == 0:
        return -1.0
    return float(values.flatten().kthvalue(count).values)
