"""CPTQuant (Nanda et al. 2024, CPTQuant: A Novel Mixed Precision Post-Training Quantization
Techniques for Large Language Models, arXiv:2412.03599): more bits for the more sensitive layers.

| measure | s_l of a layer |
| --- | --- |
| "correlation" (CMPQ) | 1 - mean canonical correlation of the layer's input and output |
| "pruning" (PMPQ) | mean rise of the loss with the smallest |w| of this layer at 0, over a grid |
| "taylor" (TDMPQ) | ||dL/dx|| ||x|| / sqrt(n): what noise in its input x does to the loss |

All layers start at the most bits; the layer of least s_l for each bit saved goes down by a level,
until the mean over the weights is at most `bits`. Then weights are rounded to the nearest, with a
scale for each output row:

    s = max |w| / (2^(b - 1) - 1) or a little less,   W_q = s clamp(round(W / s)).

16 bits leave a layer as it is. We found no official code and of the paper the abstract alone: the
pairing of the correlation, the noise, the grid and the levels are ours.

In our quick setting (claim 107: a 6M-parameter Llama, a mean of 4 bits from 6, 4 and 3) each
measure beats its reversed choice by 0.012 to 0.015 nats, and each loses to 4 bits everywhere, by
0.003 to 0.006. The rank correlation of pruning sensitivity with what rounding each tensor to 3 bits
costs is 0.20 (0.03 to 0.37).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sparseworks.core.bits import bits_by_sensitivity
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import default_loss
from sparseworks.models.views import View
from sparseworks.weights.oneshot.sensitivity import block_of
from sparseworks.weights.quantization.method import Quantization, Work
from sparseworks.weights.quantization.sensitivities import correlation, pruning, taylor

__all__ = ["CPTQuant"]

_WHOLE = 16  # bits at which a weight is left as it is


@dataclass(frozen=True, kw_only=True)
class CPTQuant(Quantization):
    """Choose the bits of every layer by its sensitivity, then round.

    Args:
        bits: mean over the weights, at most.
        levels: bits that a layer can have: 2 to 8, or 16.
        measure: of sensitivity.
        per: what has one number of bits: a "block", or a "tensor" (not with "correlation").
        sparsities: the grid of "pruning".
        damping: of the covariances of "correlation".
        reverse: the least sensitive layers get the most bits: the control.
        given: s_l that an earlier call measured (its `figures["sensitivity"]`); None: measured.
    """

    bits: float = 6.0
    levels: tuple[int, ...] = (8, 6, 4)
    measure: Literal["pruning", "taylor", "correlation"] = "pruning"
    per: Literal["block", "tensor"] = "block"
    sparsities: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    damping: float = 1e-4
    reverse: bool = False
    given: Mapping[str, float] | None = field(default=None, repr=False, compare=False)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="cptquant",
        title="CPTQuant: A Novel Mixed Precision Post-Training Quantization Techniques for Large "
        "Language Models",
        authors="Nanda et al.",
        year=2024,
        card="107",
        room="weights",
        kind="quantization",
        needs=("data",),
        pattern="that of the model's masks",
        budget="bits by sensitivity",
        cost="pruning: a pass over the data for each layer and sparsity; taylor: one backward pass",
        summary="choose the bits of each layer by its sensitivity",
    )

    def __post_init__(self) -> None:
        if not self.levels or not all(2 <= b <= 8 or b == _WHOLE for b in self.levels):
            raise InvalidArgument(f"cptquant: levels={self.levels}; 2 to 8 bits, or 16")
        if not self.bits >= min(self.levels):
            raise InvalidArgument(f"cptquant: bits={self.bits} below the lowest of {self.levels}")
        if self.measure not in ("pruning", "taylor", "correlation") or self.per not in (
            "block", "tensor",
        ):  # fmt: skip
            raise InvalidArgument(f"cptquant: measure={self.measure!r}, per={self.per!r}")
        if self.measure == "correlation" and self.per == "tensor":
            raise InvalidArgument("cptquant: 'correlation' is of whole blocks: per='block'")
        if not self.sparsities or not all(0 < s < 1 for s in self.sparsities):
            raise InvalidArgument(f"cptquant: sparsities={self.sparsities} between 0 and 1")
        if not self.damping > 0:
            raise InvalidArgument(f"cptquant: damping={self.damping} must be positive")

    def run(self, work: Work) -> None:
        layers: dict[str, list[View]] = {}
        for view in work.fitting(None):
            name = view.module_name if self.per == "tensor" else block_of(view)
            layers.setdefault(view.module_name if name == view.name else name, []).append(view)
        found = dict(self.sensitivity(work, layers) if self.given is None else self.given)
        if set(found) != set(layers):
            odd = min(set(found) ^ set(layers))
            raise InvalidArgument(f"cptquant: `given` and the layers differ in {odd!r}")
        used = {n: -s for n, s in found.items()} if self.reverse else found
        least = min(used.values())
        used = {n: s - least for n, s in used.items()} if self.reverse else used
        sizes = {n: sum(v.parameter.numel() for v in views) for n, views in layers.items()}
        chosen = bits_by_sensitivity(used, sizes, self.levels, self.bits)
        work.figures |= {"sensitivity": found, "bits": chosen}
        for i, (name, views) in enumerate(layers.items()):
            for view in views:
                if chosen[name] == _WHOLE:
                    work.skipped[view.name] = "its layer has 16 bits"
                else:
                    work.put(view, work.rounded(view, chosen[name], None, zeros=False))
            work.tell(i + 1, len(layers), name)

    def sensitivity(self, work: Work, layers: dict[str, list[View]]) -> dict[str, float]:
        """s_l of every layer, on the model as it is."""
        assert work.batches is not None
        loss = work.loss or default_loss
        if self.measure == "pruning":
            return pruning(work.model, layers, work.batches, loss, self.sparsities)
        if self.measure == "taylor":
            return taylor(work.model, list(layers), work.batches, loss)
        return correlation(work.model, list(layers), work.batches, self.damping)
