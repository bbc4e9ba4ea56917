"""SparseByteNN (Xu et al. 2023): fine-grained groups of outputs that share their inputs.

Finer than channels, so it costs less accuracy; coarser than single weights, so that a kernel loads
an input once for G outputs and runs fast at 30 % sparsity already. A unit is G weights, those of
one input (and one tap of a convolution) in G consecutive outputs g = {Gi, .., Gi + G - 1}:

    score(g, c) = sum_{r in g} |W_rc|^p,    the best (1 - s) of the units stay.

Which outputs are consecutive is free: a permutation of the channels of the whole network, the same
for all layers that meet in a sum, leaves its function as it is. It is chosen to retain the most
score, and costs nothing when the network runs (`rearranging`).

The abstract names the parts (group kernel patterns, a whole-network rearrangement, kernels made for
the pattern); the score, the search for the permutation and the balanced form are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.patterns import Pattern
from sparseworks.core.registry import MethodInfo
from sparseworks.models.views import View
from sparseworks.weights.oneshot.base import OneShot, Target, Work
from sparseworks.weights.semistructured.permuting import permute
from sparseworks.weights.semistructured.rearranging import groups_of, rearrange_views

__all__ = ["SparseByteNN"]


@dataclass(frozen=True, kw_only=True)
class SparseByteNN(OneShot):
    """Permute the outputs of every layer, then keep the best groups of weights.

    The first calibration batch serves to trace the model and to check that the permutations leave
    its outputs as they are. Layers that cannot be permuted are pruned in their own order, and
    named in the result's warnings. A model that has masks already keeps its order.

    Norms with running statistics no longer fit what half the weights give: estimate them anew
    (`training.recalibration.reestimate`) or fine-tune. Before that the accuracy of a half-sparse
    ResNet-20 was 15 to 55 % as the order fell out, permuted or not; after it 79 and 76 %.

    The paper leaves the first convolution dense: name it in `exclude=`.

    For gradual pruning call `sparseworks.rearrange` first, then train with "gradual" and the same
    pattern.

    Args:
        pattern: "shared4" (groups of 4 outputs), "shared8", "shared4-balanced" (equally many units
            in every group), "block4x1".
        power: |w|^power is what units add up.
    """

    pattern: str | Pattern = "shared4"
    power: float = 1.0

    info: ClassVar[MethodInfo] = MethodInfo(
        name="sparse-byte-nn",
        title="SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on Fine-Grained "
        "Group Sparsity",
        authors="Xu et al.",
        year=2023,
        room="weights",
        kind="one-shot",
        card="169",
        needs=("data",),
        pattern="groups of outputs that share inputs (sharedG, sharedG-balanced, blockGx1)",
        budget="uniform",
        cost="a search over permutations: seconds a layer; one batch",
        summary="groups of outputs share inputs, after a permutation that keeps the function",
    )

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise InvalidArgument(f"sparse-byte-nn: power={self.power} must be positive")

    def score(self, target: Target, weight: Tensor, evidence: Any) -> Tensor:
        return weight.abs() if self.power == 1.0 else weight.abs().pow(self.power)

    def prepare(self, work: Work, views: Sequence[View], sparsity: float) -> Callable[[], None]:
        groups = groups_of(work.pattern)
        if len(work.record):
            work.warnings.append("the model has masks, which were chosen for its order: it stays")
            return super().prepare(work, views, sparsity)
        assert work.batches is not None
        scores = work.score_all(views, {})
        keep = work.budget([v.spec(work.pattern) for v in views], sparsity, scores)
        try:
            done = rearrange_views(work.model, work.batches[0], views, scores, keep, groups)
        except ModelError as error:
            work.warnings.append(f"the channels stay in their order: {error}")
            return super().prepare(work, views, sparsity)
        work.warnings += [f"{name} is not rearranged: {why}" for name, why in done.fixed.items()]
        back = [p.inverse() for p in reversed(done.permutations)]
        return lambda: permute(work.model, back)
