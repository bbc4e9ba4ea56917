"""Each component of a pipeline has its own sparsity: find the cliffs, then combine below them.

For components c with n_c prunable weights, Q_c(s) is the quality with c alone pruned to s. Its
cliff is the largest s before the first s at which Q falls below the wanted quality t, or falls by
more than kappa times the median change so far and by a tenth of Q(0) - t at least (a curve that
begins flat has no cliff where it first stirs). From the cliffs (s_1, .., s_C), a small grid at and
just below them, and with components left dense, is tried together, and the pipeline gets

    argmax sum_c n_c s_c   subject to   Q(s_1, .., s_C) >= t.

Source: Ramesh, Zhao 2024, Efficient Pruning of Text-to-Image Models: Insights from Pruning Stable
Diffusion (the study: components differ in what they bear, magnitude suffices, quality ends in a
cliff). The rule for the cliff and the search are ours.

In our quick setting (claim 189: a small text encoder and diffusion transformer on digits) the
encoder bears 60 to 65 %, the denoiser 10 %, and a sparsity for each removes 26 % of the weights
where one for both removes 10 %; but magnitude does not beat Wanda (relative error 0.012
higher at the same sparsities over 5 seeds, 0.003 to 0.021).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.core.types import Progress
from sparseworks.models.blocks import first_tensor
from sparseworks.models.calls import Batch, call
from sparseworks.models.hooks import duplicate
from sparseworks.models.modes import evaluating
from sparseworks.models.views import find_prunable
from sparseworks.weights.oneshot.base import Found, Search
from sparseworks.weights.oneshot.cliffs import ComponentsResult, Curve, find_cliff, steepness
from sparseworks.weights.oneshot.prune import prune

__all__ = ["Components", "ComponentsResult", "Curve", "find_cliff"]

Patterns = str | tuple[str, ...]
Quality = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Components(Search):
    """Choose a sparsity per component by its own curve, and prune.

    Args:
        parts: name -> name patterns of the weights of a component; None: the children of the model
            that hold prunable weights.
        quality: `(model) -> float`, higher is better; None: minus the relative error of the outputs
            on `data`, sum ||f_s(x) - f(x)||^2 / sum ||f(x)||^2.
        least: quality to keep.
        method: registered one-shot method, or an object of one.
        step: between sparsities of a curve.
        most: largest sparsity tried.
        kappa: how many times the usual slope is a cliff.
        below: steps below each cliff that are tried in combination.
    """

    parts: Mapping[str, Patterns] | None = None
    quality: Quality | None = field(default=None, repr=False)
    least: float = -0.05
    method: Any = "magnitude"
    step: float = 0.05
    most: float = 0.9
    kappa: float = 5.0
    below: int = 2

    info: ClassVar[MethodInfo] = MethodInfo(
        name="components",
        title="Efficient Pruning of Text-to-Image Models: Insights from Pruning Stable Diffusion",
        authors="Ramesh, Zhao",
        year=2024,
        room="weights/oneshot",
        kind="search",
        card="189",
        needs=("data",),
        pattern="any of the method's",
        budget="a sparsity per component, by its own cliff",
        cost="one pruning and one look at the quality per point of the curves",
        summary="find how much each component of a pipeline bears, and prune each to its own cliff",
    )

    def find(
        self,
        model: nn.Module,
        batches: Sequence[Batch] | None,
        *,
        seed: int,
        progress: Progress | None,
    ) -> Found:
        """Sparsities for the weights of every component.

        Raises:
            InvalidArgument: an option is out of range, or no component bears any sparsity.
            DataError: there is neither `quality` nor data to compare outputs on.
        """
        parts = _children(model) if self.parts is None else self.parts
        quality = self.quality
        if quality is None:
            if not batches:
                raise DataError("components compares outputs: give data=, or quality=")
            quality = _Fidelity(model, batches)
        found = self.explore(
            model, parts, quality, least=self.least, data=batches, progress=progress
        )
        sparsity = {
            view.name: share
            for name, share in found.sparsity.items()
            for view in find_prunable(model, parts[name]).views
            if share > 0
        }
        if not sparsity:
            raise InvalidArgument(
                f"no component bears a sparsity of {self.step:g} at a quality of {self.least:g}: "
                "lower least= or step="
            )
        told = {"components": dict(found.sparsity), "quality": found.quality}
        return Found(self.method, sparsity, told)

    def search(
        self,
        model: nn.Module,
        components: Mapping[str, Patterns],
        quality: Quality,
        *,
        least: float,
        data: Iterable[Batch] | None = None,
        progress: Progress | None = None,
    ) -> ComponentsResult:
        """`explore`, then prune the model in place."""
        batches = None if data is None else list(data)
        found = self.explore(
            model, components, quality, least=least, data=batches, progress=progress
        )
        self._prune(model, components, found.sparsity, batches)
        return found

    def explore(
        self,
        model: nn.Module,
        components: Mapping[str, Patterns],
        quality: Quality,
        *,
        least: float,
        data: Iterable[Batch] | None = None,
        progress: Progress | None = None,
    ) -> ComponentsResult:
        """Measure the curves and their combinations on copies; the model stays as it is.

        Args:
            model: holds all components.
            components: name -> name patterns of its weights ("text_encoder", "unet.*").
            quality: of a model, higher is better; called with pruned copies. Compare samples of
                the same noise, or the differences between them hide those of the weights.
            least: quality to keep.
            data: calibration batches for methods that need them, over all time steps.
            progress: called with (done, total, what).

        Raises:
            InvalidArgument: an option is out of range, or two components share a weight.
            DataError: the quality of the dense model is already below `least`.
        """
        if not 0 < self.step <= self.most < 1 or self.kappa <= 1 or self.below < 0:
            raise InvalidArgument(
                "0 < step= <= most= < 1, kappa= above 1 and below= at least 0 are needed"
            )
        sizes = self._sizes(model, components)
        dense = float(quality(model))
        if not dense >= least:
            raise DataError(f"the dense model has quality {dense:.4g}, below least={least:.4g}")
        batches = None if data is None else list(data)

        def measured(sparsity: Mapping[str, float]) -> float:
            trial = duplicate(model)
            self._prune(trial, components, sparsity, batches)
            return float(quality(trial))

        grid = [0.0]
        while grid[-1] + self.step <= self.most + 1e-9:
            grid.append(round(grid[-1] + self.step, 10))
        curves = {}
        for k, name in enumerate(components):
            values = [dense, *(measured({name: s}) for s in grid[1:])]
            i = find_cliff(grid, values, least, self.kappa)
            curves[name] = Curve(
                sizes[name], tuple(grid), tuple(values), grid[i], steepness(values)
            )
            if progress is not None:
                progress(k + 1, len(components), "curves of the components")
        options = [
            dict(zip(curves, choice))
            for choice in itertools.product(
                *(
                    [
                        s
                        for s in grid
                        if s == 0 or c.cliff - self.below * self.step - 1e-9 <= s <= c.cliff
                    ]
                    for c in curves.values()
                )
            )
        ]
        options.sort(key=lambda o: -sum(sizes[n] * s for n, s in o.items()))  # the last: nothing
        trials: list[tuple[Mapping[str, float], float]] = []
        for chosen in options:
            found = measured(chosen) if any(chosen.values()) else dense
            trials.append((chosen, found))
            if found >= least:
                break
        best, found = trials[-1]
        overall = sum(sizes[n] * s for n, s in best.items()) / sum(sizes.values())
        return ComponentsResult(curves, best, found, overall, tuple(trials))

    def _sizes(self, model: nn.Module, components: Mapping[str, Patterns]) -> dict[str, int]:
        if len(components) < 2:
            raise InvalidArgument("components= names two or more parts of the model")
        owner: dict[str, str] = {}
        sizes = {}
        for name, patterns in components.items():
            views = find_prunable(model, patterns).views
            for view in views:
                if view.name in owner:
                    raise InvalidArgument(
                        f"{view.name} belongs to the components {owner[view.name]!r} and {name!r}"
                    )
                owner[view.name] = name
            sizes[name] = sum(view.parameter.numel() for view in views)
        return sizes

    def _prune(
        self, model: nn.Module, components: Mapping[str, Patterns],
        sparsity: Mapping[str, float], data: list[Batch] | None,
    ) -> None:  # fmt: skip
        for name, share in sparsity.items():
            if share > 0:
                prune(model, self.method, sparsity=share, include=components[name], data=data)


def _children(model: nn.Module) -> dict[str, Patterns]:
    """The children of the model, or of the one that holds all, with their prunable weights."""
    found: dict[str, list[str]] = {}
    for view in find_prunable(model):
        found.setdefault(view.name.partition(".")[0], []).append(view.name)
    if len(found) == 1:  # all below one child: by what they are below in there
        names = next(iter(found.values()))
        found = {}
        for name in names:
            found.setdefault(".".join(name.split(".")[:2]), []).append(name)
    return {part: tuple(names) for part, names in found.items()}


class _Fidelity:
    """Minus the relative error of a model's outputs: -sum ||f_s(x) - f(x)||^2 / sum ||f(x)||^2."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.expected = self._outputs(model)
        self.energy = sum(float(y.square().sum()) for y in self.expected)

    def __call__(self, model: nn.Module) -> float:
        pairs = zip(self._outputs(model), self.expected)
        error = sum(float((y - e).square().sum()) for y, e in pairs)
        return -error / max(self.energy, 1e-30)

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with evaluating(model):
            outputs = [first_tensor(call(model, batch)) for batch in self.batches]
        return [y.double() for y in outputs if y is not None]
