"""How sparse numbers are, without a threshold: the PQ index and the Gini index.

With 0 < p < q and d survivors, the PQ index (Diao et al. 2023, Pruning Deep Neural Networks from a
Sparsity Perspective) compares two power means:

    I(w) = 1 - (mean |w|^p)^(1/p) / (mean |w|^q)^(1/q)     in [0, 1 - d^(1/q - 1/p)].

It is 0 when all magnitudes are equal and largest when one weight holds everything; scale and
repetition of the vector do not change it. It also bounds how many weights matter: if all but the r
largest hold at most eta times what those hold, sum_tail |w|^p <= eta sum_kept |w|^p, then

    r >= d (1 + eta)^(-q / (q - p)) (1 - I)^(p q / (q - p)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument

__all__ = ["check_powers", "gini_index", "pq_bound", "pq_index"]


def check_powers(p: float, q: float, where: str = "PQ index") -> None:
    """Refuse powers that do not satisfy 0 < p < q."""
    if not 0 < p < q < float("inf"):
        raise InvalidArgument(f"{where}: p={p}, q={q}; 0 < p < q is needed")


def pq_index(
    values: Tensor, kept: Tensor | None = None, *, p: float = 0.5, q: float = 1.0
) -> Tensor:
    """The PQ index of every row; higher is sparser.

    Args:
        values: `[..., d]`, any real dtype, finite.
        kept: bool, of the same shape; None: all. What is masked does not count: as zeros it would
            raise the index.
        p: the lower power.
        q: the higher power.

    Returns:
        float64 `[...]`; 0 for rows without survivors or with only zeros.

    Raises:
        InvalidArgument: powers out of order, shapes that differ, or values that are not finite.
    """
    check_powers(p, q)
    size, kept = _survivors(values, kept)
    count = kept.sum(-1)
    top = size.amax(-1, keepdim=True) if size.shape[-1] else size.sum(-1, keepdim=True)
    unit = size / torch.where(top > 0, top, 1.0)  # powers of numbers in [0, 1] cannot overflow

    def power_mean(power: float) -> Tensor:
        powers = unit.pow(power).masked_fill(~kept, 0.0)
        return (powers.sum(-1) / count.clamp_min(1)).pow(1 / power)

    high = power_mean(q)
    index = 1 - power_mean(p) / torch.where(high > 0, high, 1.0)
    return torch.where((high > 0) & (count > 0), index.clamp(0, 1), torch.zeros_like(index))


def pq_bound(
    index: Tensor, count: Tensor, *, p: float = 0.5, q: float = 1.0, eta: float = 0.0
) -> Tensor:
    """At least this many of `count` weights are needed (see the module's equation).

    Args:
        index: PQ index of the survivors.
        count: how many survive, of the same shape.
        p: the lower power.
        q: the higher power.
        eta: share of the kept sum of |w|^p that the rest may hold, at least 0.

    Returns:
        float64, not rounded.

    Raises:
        InvalidArgument: powers out of order or a negative `eta`.
    """
    check_powers(p, q)
    if eta < 0:
        raise InvalidArgument(f"PQ bound: eta={eta} must be at least 0")
    share = (1 - index.double()).pow(p * q / (q - p))
    slack: float = (1 + eta) ** (-q / (q - p))
    return count.double() * slack * share


def gini_index(values: Tensor, kept: Tensor | None = None) -> Tensor:
    """Gini index of |w| in every row: sum_i (2 i - d - 1) |w|_(i) / (d sum |w|), i from 1.

    Args:
        values: `[..., d]`.
        kept: bool, of the same shape; None: all.

    Returns:
        float64 `[...]` in [0, 1 - 1/d]; 0 for rows without survivors or with only zeros.
    """
    size, kept = _survivors(values, kept)
    count = kept.sum(-1, keepdim=True)
    ordered = size.masked_fill(~kept, -1.0).sort(-1).values.clamp_min(0)  # the masked come first
    rank = torch.arange(1, size.shape[-1] + 1, device=size.device) - (size.shape[-1] - count)
    total = ordered.sum(-1)
    weighted = ((2 * rank - count - 1) * ordered).sum(-1)
    index = weighted / torch.where(total > 0, total * count.squeeze(-1), 1.0)
    return torch.where(total > 0, index.clamp(0, 1), torch.zeros_like(index))


def _survivors(values: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """|w| in float64 with zeros where masked, and the mask."""
    if kept is None:
        kept = torch.ones_like(values, dtype=torch.bool)
    if kept.shape != values.shape:
        raise InvalidArgument(
            f"sparsity index: kept {tuple(kept.shape)} and values {tuple(values.shape)} differ"
        )
    size = values.detach().double().abs().masked_fill(~kept, 0.0)
    if not bool(torch.isfinite(size).all()):
        raise InvalidArgument("sparsity index: a value is NaN or infinite; check the weights")
    return size, kept
