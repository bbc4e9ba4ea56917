"""Which weights of a model can be sparse, as matrices, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.hooks import torch_mask
from sparseworks.models.matrix import View, parameters_of, plain_view, view_of
from sparseworks.models.roles import (
    ADAPTER,
    Adapters,
    is_bare,
    is_router,
    matches,
    output_head,
    why_dense,
)

__all__ = ["Look", "Prunable", "Skipped", "View", "find_prunable", "recorded_views", "view_of"]


@dataclass(frozen=True)
class Skipped:
    """A weight that is left dense, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Prunable(Sequence[View]):
    """The prunable weights of a model in module order, and those left out with the reason."""

    views: tuple[View, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> View:  # type: ignore[override]
        return self.views[index]

    def __iter__(self) -> Iterator[View]:
        return iter(self.views)

    def by_name(self) -> dict[str, View]:
        return {v.name: v for v in self.views}

    def reasons(self) -> dict[str, str]:
        """Name -> why it is left dense."""
        return {s.name: s.reason for s in self.skipped}


# tells of bare parameters how the model multiplies by them: their views, or why they have none
Look = Callable[[Sequence[View]], Mapping[str, View | str]]


def recorded_views(
    model: nn.Module, record: Container[str], plain: Callable[[str], str] = str
) -> list[View]:
    """A view of every parameter that a mask record names, each parameter once.

    Args:
        model: any module.
        record: names.
        plain: makes the names of a wrapped model those of the record.
    """
    found: dict[int, View] = {}
    for full, module, attribute, parameter in parameters_of(model):
        name = plain(full)
        if name in record and id(parameter) not in found:
            view = view_of(module, attribute, name)
            found[id(parameter)] = view or plain_view(name, module, attribute)
    return list(found.values())


def find_prunable(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    embeddings: bool = False,
    torch_masked: bool = False,
    look: Look | None = None,
    required: bool = True,
) -> Prunable:
    """The weights a method may make sparse, each parameter once; all others, each with the reason.

    By default every Linear, Conv1d/2d/3d, HF Conv1D, RNN, LSTM, GRU (and cells), attention
    in-projection and expert bank; not embeddings (nor what is tied to them), not the output head,
    not MoE routers, adapters, norms or biases. No parameter of two or more axes is missing in the
    result.

    Args:
        model: any module.
        include: name patterns (shell style, on parameter or module names); only these, and these
            even where the default leaves them out. An adapter is meant only by its own name.
        exclude: name patterns to leave out.
        embeddings: embedding tables count as well, `[entries, width]`.
        torch_masked: so does the `weight_orig` of layers pruned with `torch.nn.utils.prune`; the
            caller keeps what `View.torch_mask` masks.
        look: tells how bare parameters that `include` names are multiplied; without it they are
            left dense.
        required: raise where a name pattern matches no weight, or nothing is left to prune.

    Raises:
        InvalidArgument: a name pattern matches no weight.
        ModelError: nothing is left to prune.
    """
    choice = _Choice(model, _patterns(include), _patterns(exclude), embeddings, torch_masked)
    places = list(parameters_of(model))
    bare = [plain_view(n, m, a) for n, m, a, p in places if choice.bare(n, m, a, p)]
    seen = look(bare) if look is not None and bare else {}
    views: list[View] = []
    skipped: list[Skipped] = []
    for name, module, attribute, parameter in places:
        view = choice.view(name, module, attribute)
        found = seen.get(name)
        view = found if isinstance(found, View) else view
        if view is None and parameter.ndim < 2:
            continue
        reason = choice.reason(name, parameter, view is not None)
        if not reason and view is None:
            reason = found if isinstance(found, str) else why_dense(name, module, attribute)
        if view is not None and not reason:
            choice.taken[id(parameter)] = name
            views.append(view)
        else:
            skipped.append(Skipped(name, reason))
        choice.note(name, view is not None, reason)
    if required:
        choice.check()
    if required and not views:
        none = "no Linear, Conv or RNN"
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3]) or none
        raise ModelError(f"{type(model).__name__} has no prunable weight ({reasons})")
    return Prunable(tuple(views), tuple(skipped))


class _Choice:
    """Which weights a call of `find_prunable` takes, and what its name patterns matched."""

    def __init__(
        self,
        model: nn.Module,
        include: list[str],
        exclude: list[str],
        embeddings: bool,
        torch_masked: bool,
    ) -> None:
        self.include, self.exclude = include, exclude
        self.embeddings, self.torch_masked = embeddings, torch_masked
        self.tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.adapters = Adapters(model)
        self.head = output_head(model, self.adapters)
        self.taken: dict[int, str] = {}  # parameter -> the name under which it is treated
        self._unmatched = {*include, *exclude}
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
        if parameter.device.type == "meta":
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
