"""Fast Sparse ConvNets (Elsen et al. 2019): sparse 1 x 1 convolutions in separable networks.

In a separable network nearly all time goes into 1 x 1 convolutions, y = W x + b with W `[out, in]`
and x `[in, pixels]`. They alone become sparse, all to the same share s(t) = s_f (1 - (1 - t)^3) of
zeros by magnitude, while the network trains; depthwise and first convolutions and the classifier
stay dense. In the last layers, blocks of consecutive output channels share their inputs (mean |w|
decides), which serves several outputs with one load.

`sparseworks.compile` runs the result: pixels of a channel lie side by side, a kept weight is one
broadcast times a run of pixels, and rows that share their taps go four at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from sparseworks.core.budgets import Budget, get_budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import Pattern
from sparseworks.core.patterns.groups import Block
from sparseworks.core.registry import MethodInfo
from sparseworks.core.schedules import periodic
from sparseworks.models.views import View
from sparseworks.training.hooked import Run
from sparseworks.weights.dynamic.gradual import Gradual
from sparseworks.weights.dynamic.masks import magnitudes, span

__all__ = ["FastSparseConvNets", "is_pointwise"]


def is_pointwise(module: nn.Module) -> bool:
    """A 1 x 1 convolution that mixes all channels."""
    return isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1} and module.groups == 1


@dataclass(frozen=True)
class FastSparseConvNets(Gradual):
    """Gradual magnitude pruning of the 1 x 1 convolutions alone.

    Args:
        block: output channels that share their inputs in the last layers.
        last: share of the 1 x 1 layers, counted from the end, that take blocks.
    """

    block: int = 4
    last: float = 0.25

    budget: str | Budget = field(default="uniform", kw_only=True)
    info: ClassVar[MethodInfo] = MethodInfo(
        name="fast-sparse-convnets",
        title="Fast Sparse ConvNets",
        authors="Elsen et al.",
        year=2019,
        room="weights",
        kind="hooked",
        card="113",
        needs=("training",),
        pattern="unstructured, blocks of outputs in the last layers",
        budget="uniform",
        tensors="1 x 1 convolutions",
        cost="one selection every `every` steps",
        summary="sparse 1 x 1 convolutions that run fast on channel-major activations",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or not 0 <= self.last <= 1:
            raise InvalidArgument(
                f"fast-sparse-convnets: block={self.block} must be at least 1, last={self.last} "
                "in [0, 1]"
            )

    def takes(self, view: View) -> bool:
        return is_pointwise(view.module)

    def pattern_of(self, run: Run, view: View) -> Pattern:
        """Blocks in the last layers where the outputs divide by them, else the run's pattern."""
        names = list(run.views)
        late = names.index(view.name) >= len(names) - round(self.last * len(names))
        return Block(self.block, 1) if late and view.shape[0] % self.block == 0 else run.pattern

    def update(self, run: Run) -> None:
        first, last = span(run, self.start, self.end)
        if run.step != last and not periodic(run.step, every=run.every, begin=first, end=last):
            return
        patterns = {n: self.pattern_of(run, v) for n, v in run.views.items()}
        specs = [v.spec(patterns[n]) for n, v in run.views.items()]
        scores = magnitudes(run)
        keep = get_budget(run.budget)(specs, self.sparsity_at(run, run.step), scores)
        for name, view in run.views.items():
            run.set_mask(name, view.select(patterns[name], scores[name], keep[name]))
