"""Which weights of a model can be sparse, as matrices, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sparseworks.core.errors import ModelError
from sparseworks.models.choosing import Choice
from sparseworks.models.matrix import View, parameters_of, plain_view, view_of
from sparseworks.models.roles import why_dense

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
    weightless: bool = False,
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
        weightless: so do weights on the meta device, which will have values when they are needed.
        look: tells how bare parameters that `include` names are multiplied; without it they are
            left dense.
        required: raise where a name pattern matches no weight, or nothing is left to prune.

    Raises:
        InvalidArgument: a name pattern matches no weight.
        ModelError: nothing is left to prune.
    """
    choice = Choice(model, include, exclude, embeddings, torch_masked, weightless)
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
