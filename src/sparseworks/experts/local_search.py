"""Local search over the arrangement of experts (Ibrahim et al. 2023): a permutation of a gate's
outputs that is learned in the first steps and then fixed.

    P = Sinkhorn(B / tau): exp(B / tau) with rows and columns divided by their sums in turn,
    tau from 1e-3 to 1e-7 and 20 to 150 turns, log-linear in the progress of the search;
    then P is the permutation of largest sum of B_ij, by linear assignment, as always in evaluation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["LocalSearch", "assignment", "sinkhorn"]

_TAU = (1e-3, 1e-7)
_TURNS = (20, 150)


def sinkhorn(logits: Tensor, turns: int) -> Tensor:
    """A matrix whose rows and columns have sums near 1, from logits `[..., n, n]`."""
    for _ in range(turns):
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits.exp()


def assignment(scores: Tensor) -> Tensor:
    """For every row of `[n, n]` its column, so that the sum of the chosen scores is largest.

    The Hungarian method with potentials: rows enter one by one, each by a shortest path.
    """
    n = len(scores)
    cost = (-scores.detach().double().cpu()).tolist()
    rows, columns = [0.0] * (n + 1), [0.0] * (n + 1)  # potentials; place 0 is outside
    owner = [0] * (n + 1)  # row of each column, counted from 1
    for row in range(1, n + 1):
        owner[0], column = row, 0
        least, before, done = [math.inf] * (n + 1), [0] * (n + 1), [False] * (n + 1)
        while owner[column]:
            done[column] = True
            i, best, following = owner[column], math.inf, 0
            for j in range(1, n + 1):
                if done[j]:
                    continue
                reduced = cost[i - 1][j - 1] - rows[i] - columns[j]
                if reduced < least[j]:
                    least[j], before[j] = reduced, column
                if least[j] < best:
                    best, following = least[j], j
            for j in range(n + 1):
                if done[j]:
                    rows[owner[j]] += best
                    columns[j] -= best
                else:
                    least[j] -= best
            column = following
        while column:
            owner[column] = owner[before[column]]
            column = before[column]
    found = torch.empty(n, dtype=torch.long)
    for j in range(1, n + 1):
        found[owner[j] - 1] = j - 1
    return found.to(scores.device)


class LocalSearch(nn.Module):
    """Permutes the last axis of gates; soft while it searches, in training.

    Args:
        experts: n.
        count: permutations, one for all trees or one for each.
        generator: of the first logits, uniform in (-0.05, 0.05).
    """

    fixed: Tensor
    searching: Tensor

    def __init__(
        self, experts: int, count: int = 1, *, generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        made = 0.1 * torch.rand(count, experts, experts, generator=generator) - 0.05
        self.logits = nn.Parameter(made.to(device, dtype or torch.get_default_dtype()))
        self.register_buffer("fixed", torch.zeros(count, experts, dtype=torch.long, device=device))
        self.register_buffer("searching", torch.ones((), dtype=torch.bool, device=device))
        self.progress = 0.0

    def advance(self, progress: float) -> None:
        """Go on to this share of the search; at 1 the permutation is fixed."""
        if bool(self.searching):
            self.progress = min(1.0, progress)
            if progress >= 1:
                self.settle()

    def settle(self) -> None:
        """End the search with the hard permutation of the logits as they are."""
        self.fixed.copy_(self.hard())
        self.searching.fill_(False)

    def hard(self) -> Tensor:
        """`[count, n]`, the output that each entry goes to."""
        if not bool(self.searching):
            return self.fixed
        return torch.stack([assignment(b) for b in self.logits])

    def matrix(self) -> Tensor:
        """P `[count, n, n]`."""
        if self.training and bool(self.searching):
            tau = _TAU[0] ** (1 - self.progress) * _TAU[1] ** self.progress
            turns = round(_TURNS[0] ** (1 - self.progress) * _TURNS[1] ** self.progress)
            return sinkhorn(self.logits.float() / tau, turns)
        eye = torch.eye(self.fixed.shape[1], dtype=self.logits.dtype, device=self.logits.device)
        return eye[self.hard()]

    def forward(self, gates: Tensor) -> Tensor:
        """`[..., trees, n]` to the same shape."""
        found: Tensor = (gates[..., None, :] @ self.matrix().to(gates.dtype))[..., 0, :]
        return found

    def entropy(self) -> Tensor:
        """Of rows and columns, summed; 0 for a permutation."""
        p = self.matrix()
        sides = [p / p.sum(axis, keepdim=True).clamp_min(1e-30) for axis in (-1, -2)]
        return torch.stack([-(s * (s + 1e-12).log()).sum() for s in sides]).sum()
