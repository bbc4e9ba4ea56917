"""Which weights name patterns and defaults choose, and why they leave the others dense."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.hooks import torch_mask
from sparseworks.models.matrix import View, view_of
from sparseworks.models.roles import (
    ADAPTER,
    Adapters,
    is_bare,
    is_router,
    matches,
    output_head,
)

__all__ = ["Choice"]


class Choice:
    """Which weights a call of `find_prunable` takes, and what its name patterns matched."""

    def __init__(
        self,
        model: nn.Module,
        include: str | Iterable[str] | None,
        exclude: str | Iterable[str] | None,
        embeddings: bool,
        torch_masked: bool,
        weightless: bool = False,
    ) -> None:
        self.include, self.exclude = _patterns(include), _patterns(exclude)
        self.embeddings, self.torch_masked = embeddings, torch_masked
        self.weightless = weightless
        self.tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.adapters = Adapters(model)
        self.head = output_head(model, self.adapters)
        self.taken: dict[int, str] = {}  # parameter -> the name under which it is treated
        self._unmatched = {*self.include, *self.exclude}
        self._dense: dict[str, str] = {}  # pattern -> what it matched that has no view
        self._weights: list[str] = []

    def view(self, name: str, module: nn.Module, attribute: str) -> View | None:
        if self.embeddings and isinstance(module, nn.Embedding):
            return View(name, module, attribute, "linear")
        if not self.torch_masked and torch_mask(module, attribute) is not None:
            return None
        return view_of(module, attribute, name)

    def bare(self, name: str, module: nn.Module, attribute: str, parameter: nn.Parameter) -> bool:
        """Is it a bare parameter that may be taken once it is known how it multiplies?"""
        return (
            parameter.ndim >= 2
            and bool(self.include)
            and self.view(name, module, attribute) is None
            and is_bare(name, module, attribute)
            and not self.reason(name, parameter, True)
        )

    def reason(self, name: str, parameter: nn.Parameter, known: bool) -> str:
        """Why a parameter is left dense, or "".

        Args:
            known: it is the weight of a known layer.
        """
        asked = any(_named(name, p) for p in self.include)
        chosen = asked and known
        if id(parameter) in self.taken:
            return f"the same tensor as {self.taken[id(parameter)]}, which is treated once"
        if any(_named(name, p) for p in self.exclude):
            return "excluded by name"
        if self.include and not asked:
            return "not included by name"
        if self.adapters.part(name) is not None and not self.adapters.named(name, self.include):
            return ADAPTER
        if is_router(name) and not asked:
            return "router of a mixture of experts"
        if not known:
            return ""
        if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
            return f"quantized ({parameter.dtype})"
        if id(parameter) in self.tables and not chosen and not self.embeddings:
            return "tied to an embedding"
        if parameter is self.head and not chosen:
            return "output head"
        if parameter.device.type == "meta" and not self.weightless:
            return "on the meta device: it has no values"
        return ""

    def note(self, name: str, known: bool, reason: str) -> None:
        """Remember what the patterns matched."""
        matched = {p for p in self._unmatched if _named(name, p)}
        if known:
            self._weights.append(name)
            self._unmatched -= matched
        else:
            self._unmatched -= matched & {*self.exclude}
            self._dense.update((p, f"{name}, which stays dense: {reason}") for p in matched)

    def check(self) -> None:
        """Raise where a pattern matched no weight."""
        for pattern in sorted(self._unmatched):
            if pattern in self._dense:
                raise InvalidArgument(f"name pattern {pattern!r} means {self._dense[pattern]}")
            known = ", ".join(self._weights[:3]) + (", ..." if len(self._weights) > 3 else "")
            raise InvalidArgument(
                f"name pattern {pattern!r} matches no weight; weights are named like {known}"
            )


def _patterns(given: str | Iterable[str] | None) -> list[str]:
    if given is None:
        return []
    return [given] if isinstance(given, str) else list(given)


def _named(name: str, pattern: str) -> bool:
    """Does a pattern match a parameter, also by the name of the weight computed from it?"""
    weight = name.replace(".parametrizations.", ".").replace("parametrizations.", "", 1)
    return any(
        matches(n, pattern) for n in dict.fromkeys((name, name.removesuffix("_orig"), weight))
    )
