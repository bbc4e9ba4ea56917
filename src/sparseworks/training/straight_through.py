"""Straight-through training: layers compute with a part of the weights, and all of them train.

With theta all weights of a tensor and M the mask that the pattern chooses from them,

    forward   W = theta * M                  (or what a method makes of theta and M)
    backward  dL/dtheta := dL/dW             straight through the mask, masked entries included
    step      theta <- optimizer(theta, dL/dtheta + what a method adds)
    then      M <- select(|theta|)           exactly N of every M inputs, after every step

(Bengio et al. 2013, Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
Computation, arXiv:1308.3432.) Between steps the parameter of the layer holds W and the run holds
theta; during the optimizer's step it is the other way round. So a layer is an ordinary layer
(`torch.compile`, DDP and evaluation see nothing but sparse weights), a mask is chosen once a step
however many batches add up to it, and weight decay, momentum and clipping are those of a dense
training with theta. What a method adds to the gradient is added once a step, after unscaling and
clipping; a closure is called with W in the layers.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparseworks.core.errors import PatternError
from sparseworks.core.patterns import Pattern
from sparseworks.kernels.zeroing import keep_only
from sparseworks.models.views import View
from sparseworks.training.method import Hooked

__all__ = ["AtIntervals", "StraightThrough", "masked_part"]

Run = Any  # of `training.swapping`, which imports this


def masked_part(weight: Tensor, mask: Tensor) -> Tensor:
    """weight * (1 - mask), a new tensor: the entries that the layers do not compute with."""
    part = weight.clone()
    keep_only(~mask, part)
    return part


@dataclass(frozen=True, kw_only=True)
class StraightThrough(Hooked, ABC):
    """Base of methods whose masked weights train too; frozen dataclasses of options.

    A method is its difference from plain straight-through training: what layers compute with
    (`used`), what is added to the gradient (`add`), a step of its own (`rule`), when and by what
    score masks are chosen (`update`, `score`).

    Args:
        pattern: legal zeros, where the call names none.
    """

    pattern: str | Pattern = "2:4"

    has_rule: ClassVar[bool] = False  # `rule` takes the place of the optimizer's own step

    def why_not(self, view: View, pattern: Pattern) -> str:
        reason = super().why_not(view, pattern)
        if reason:
            return reason
        try:
            pattern.check(view.shape, view.run)
        except PatternError as error:
            return str(error)
        return ""

    def begin(self, run: Run) -> None:
        run.choose()

    def update(self, run: Run) -> None:
        run.choose()

    def score(self, run: Run, name: str, weight: Tensor) -> Tensor:
        """What decides who is kept, of the weight's shape: |theta|."""
        return weight.abs()

    def used(self, run: Run, name: str, weight: Tensor, mask: Tensor) -> None:
        """Turn theta, in place, into what the layer computes with: theta * M."""
        keep_only(mask, weight)

    def add(
        self,
        run: Run,
        name: str,
        weight: Tensor,
        mask: Tensor,
        gradient: Tensor,
        scale: float,
    ) -> None:
        """Add to the gradient, in place, before the optimizer steps.

        Args:
            weight: theta.
            scale: by which the gradient is still multiplied (a fused optimizer unscales itself).
        """

    def rule(
        self,
        run: Run,
        name: str,
        weight: Tensor,
        mask: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        group: Mapping[str, Any],
    ) -> None:
        """Step theta in place, with the optimizer's state and settings of this parameter."""
        raise NotImplementedError

    def leave(self, run: Run) -> None:
        """Undo what `begin` changed besides weights."""


@dataclass(frozen=True, kw_only=True)
class AtIntervals(StraightThrough):
    """Masks are chosen anew only now and then.

    Args:
        every: steps between choices of the masks.
    """

    every: int = 10

    def update(self, run: Run) -> None:
        if run.step % self.every == 0:
            run.choose()
