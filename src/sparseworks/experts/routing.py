"""What a router decides for tokens, and the capacity of experts.

For T tokens and N experts a routing is a matrix of weights w `[T, N]` and which of its entries
count. The layer computes y_t = sum over chosen i of w_ti E_i(x_t).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument

__all__ = ["Pairs", "Routing", "limit", "rank_of", "top"]


@dataclass(frozen=True, eq=False)
class Routing:
    """The decision for each token; leading axes are those of the inputs without the last.

    Args:
        weights: `[..., N]`, of the experts' outputs; 0 where an expert is not chosen.
        chosen: bool `[..., N]`, the experts that compute.
        probabilities: `[..., N]`, the router's distribution before the choice, for losses.
        logits: `[..., N]`, what it was made from.
        dropped: bool `[..., N]`, choices that a full expert turned away; None: there are none.
    """

    weights: Tensor
    chosen: Tensor
    probabilities: Tensor
    logits: Tensor
    dropped: Tensor | None = None

    @property
    def experts(self) -> int:
        return self.weights.shape[-1]

    @property
    def wanted(self) -> Tensor:
        """The choices before any was dropped."""
        return self.chosen if self.dropped is None else self.chosen | self.dropped

    def flat(self) -> Routing:
        """With one axis of tokens."""
        return self.shaped((self.weights[..., 0].numel(), self.experts))

    def shaped(self, shape: Sequence[int]) -> Routing:
        """The same decisions with other leading axes."""
        return Routing(
            self.weights.reshape(shape), self.chosen.reshape(shape),
            self.probabilities.reshape(shape), self.logits.reshape(shape),
            None if self.dropped is None else self.dropped.reshape(shape),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pairs:
    """The chosen (token, expert) pairs, by expert, then in the order of tokens.

    Args:
        token, expert: `[pairs]`.
        counts: `[N]`, pairs of each expert.
    """

    token: Tensor
    expert: Tensor
    counts: Tensor

    @classmethod
    def of(cls, chosen: Tensor) -> Pairs:
        """From bool `[T, N]`."""
        expert, token = chosen.t().nonzero(as_tuple=True)
        return cls(token, expert, chosen.sum(0))


def top(scores: Tensor, k: int) -> Tensor:
    """Bool, the k largest of the last axis; ties keep the lowest index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def rank_of(scores: Tensor) -> Tensor:
    """Place of every entry in its row, from 0 for the largest."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def limit(routing: Routing, factor: float, *, renormalize: bool = False) -> Routing:
    """At most ceil(factor * pairs / N) tokens for each expert; the others are dropped.

    First choices fill the places before second ones, each in the order of tokens (GShard). Where
    all choices of a token are dropped its output is 0, so that a residual path carries it.

    Args:
        routing: with one axis of tokens.
        factor: 1 is just enough for a balanced load.
        renormalize: what is left of a token's weights has the sum that it had before.
    """
    if not factor > 0:
        raise InvalidArgument(f"capacity={factor} must be above 0; None keeps every token")
    chosen = routing.chosen
    places = math.ceil(factor * int(chosen.sum()) / routing.experts)
    rank = rank_of(torch.where(chosen, routing.weights.detach(), -1.0))
    kept = torch.zeros_like(chosen)
    taken = torch.zeros(routing.experts, dtype=torch.long, device=chosen.device)
    for choice in range(int(chosen.sum(-1).max()) if chosen.numel() else 0):
        asked = chosen & (rank == choice)
        place = taken + asked.cumsum(0) - 1
        kept |= asked & (place < places)
        taken = taken + asked.sum(0)
    weights = routing.weights * kept
    if renormalize:
        had, left = routing.weights.sum(-1, keepdim=True), weights.sum(-1, keepdim=True)
        weights = weights * (had / left.clamp_min(torch.finfo(left.dtype).tiny))
    return replace(routing, weights=weights, chosen=kept, dropped=chosen & ~kept)
