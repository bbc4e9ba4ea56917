"""CFSP (Wang et al. 2024, CFSP: An Efficient Structured Pruning Framework for LLMs with
Coarse-to-Fine Activation Information, COLING 2025, arXiv 2409.13199): channels of MLPs by one dense
forward pass.

Coarse: block l keeps the share keep_l = (1 - p) z_l / mean z of its channels, z_l = sigmoid(a (I_l
- mean I)), I_l the mean angle between its input and output (`oneshot.coarse`).
Fine: with n_j = ||h_j|| the norm of channel j before the down-projection D `[h, F]`, and U, G the
up- and gate-projection as `[h, F]`,

    s_j = mean over h of ( D'/sum D' + |U|/sum |U| + |G|/sum |G| ) n_j^c,      D' = |D| n^b.

norm="channel" sums over the channels j of every row, the relative importance that is meant;
norm="hidden" sums over h, as the official code does, where the bracket is the same constant for all
channels and s_j is the norm n_j^c alone.

Scores are ranks, so that `slim`'s one threshold gives every block its share at any target: channel
of rank r (1 the best) of F scores -r mean z / (F z_l). A share above 1 keeps the block whole and
the others go on sharing; the official code shrinks all deviations instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.core.evidence import InputNorm
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calibration import Calibration, collect
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.changes import Change, block_changes
from sparseworks.models.coupling import Coupling, Family
from sparseworks.models.views import View, view_of
from sparseworks.weights.oneshot.coarse import SLOPE, sigmoid_shares
from sparseworks.weights.oneshot.sensitivity import block_of
from sparseworks.weights.structured.base import GroupScore, Scores

__all__ = ["CFSP", "relative_importance"]


def relative_importance(
    down: Tensor, others: Iterable[Tensor], norm: Tensor, *, over: str = "channel",
    b: float = 1.0, c: float = 1.0,
) -> Tensor:  # fmt: skip
    """The fine score s `[F]`; see this module.

    Args:
        down: `[h, F]`.
        others: up- and gate-projections, `[h, F]` each.
        norm: `[F]`, of the channels.
        over: what a ratio is relative to, "channel" or "hidden".
    """
    axis = 1 if over == "channel" else 0
    total = torch.zeros_like(norm)
    for matrix in (down.abs() * norm.pow(b), *(o.abs() for o in others)):
        share = matrix / matrix.sum(axis, keepdim=True).clamp_min(1e-30)
        total += share.mean(0)
    return total * norm.pow(c)


@dataclass(frozen=True)
class CFSP(GroupScore):
    """Cut MLP channels: how many by the block's change, which by relative importance.

    Args:
        slope: a, of the sigmoid; 0 gives every block the same share.
        change: how a block's change is measured: angular, cosine, mse, mae.
        norm: what weights are relative to: "channel" (meant) or "hidden" (the official code).
        inner: b, power of the activation inside of the down-projection's share.
        outer: c, power of the activation outside.
    """

    slope: float = SLOPE
    change: Change = "angular"
    norm: Literal["channel", "hidden"] = "channel"
    inner: float = 1.0
    outer: float = 1.0

    info: ClassVar[MethodInfo] = MethodInfo(
        name="cfsp",
        title="CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine "
        "Activation Information",
        authors="Wang et al.",
        year=2024,
        card="162",
        room="weights/structured",
        kind="structured",
        needs=("data",),
        command="sparseworks slim MODEL --data DATA --method cfsp --params 0.8 --out OUT",
        pattern="MLP channels",
        budget="flops or params; cfsp between blocks",
        cost="two forward passes over the data",
        summary="cut MLP channels by activations; blocks that change hidden states less lose more",
    )
    normalise: ClassVar[bool | None] = None
    uniform: ClassVar[bool | None] = False

    def __post_init__(self) -> None:
        if self.norm not in ("channel", "hidden") or not self.slope >= 0:
            raise InvalidArgument("cfsp: norm='channel' or 'hidden', slope= from 0")

    def takes(self, coupling: Coupling, family: Family) -> bool:
        """Is this the hidden channels of one MLP: made by some Linears, read by one, in a block?"""
        makers, readers = _sides(coupling, family)
        return bool(makers) and len(readers) == 1 and len({block_of(v) for v in makers}) == 1

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        """Ranks over shares, `[groups]`."""
        batches = list(data) if data is not None else []
        if not batches:
            raise DataError("cfsp scores channels by activations: give data=")
        sides = {f.index: _sides(coupling, f) for f in coupling.families}
        readers = [r[0] for _, r in sides.values()]
        seen = collect(
            model, readers, Calibration(batches), lambda v, d: [InputNorm(1, v.shape[1], d)]
        )
        blocks = {f.index: block_of(sides[f.index][1][0]) for f in coupling.families}
        changes = block_changes(model, [*dict.fromkeys(blocks.values())], batches, self.change)
        shares = sigmoid_shares(changes, self.slope)
        mean = sum(shares.values()) / len(shares)
        scores = np.zeros(coupling.count)
        for family in coupling.families:
            makers, (down,) = sides[family.index]
            (norms,) = seen[down.name]
            assert isinstance(norms, InputNorm)
            fine = relative_importance(
                down.matrix().float(),
                [m.matrix().float().t() for m in makers],
                norms.norm[0],
                over=self.norm, b=self.inner, c=self.outer,
            )  # fmt: skip
            rank = torch.empty(len(fine))
            rank[fine.argsort(descending=True, stable=True)] = torch.arange(1.0, len(fine) + 1)
            labels = coupling.axes[down.name, _axis(down, reads=True)]
            share = shares[blocks[family.index]] / mean
            scores[labels] = -(rank / (len(fine) * share)).double().numpy()
        return scores


def _axis(view: View, reads: bool) -> int:
    """The axis of the parameter that is its inputs, or its outputs."""
    return int(reads) if view.layout == "linear" else int(not reads)


def _sides(coupling: Coupling, family: Family) -> tuple[list[View], list[View]]:
    """The Linears that make the channels of a family, and those that read them; one entry each."""
    makers: list[View] = []
    readers: list[View] = []
    for name, axis in family.axes:
        path, _, attribute = name.rpartition(".")
        view = view_of(coupling.model.get_submodule(path), attribute, name)
        labels = coupling.axes[name, axis]
        if view is None:
            continue
        if view.layout not in ("linear", "transposed") or len(np.unique(labels)) != len(labels):
            return [], []
        (readers if axis == _axis(view, reads=True) else makers).append(view)
    return makers, readers
