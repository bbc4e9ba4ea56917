"""How a layer's tokens were spread over its experts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparseworks.experts.routing import Routing, top

__all__ = ["Load"]


@dataclass(eq=False)
class Load:
    """Counts since `reset`.

    Attributes:
        experts: N.
        tokens: seen.
        counts: `[N]`, tokens that each expert computed.
        firsts: `[N]`, tokens whose largest weight is this expert's.
        dropped: choices that a full expert turned away.
        idle: tokens that no expert computed.
    """

    experts: int
    tokens: int = 0
    counts: Tensor = field(init=False)
    firsts: Tensor = field(init=False)
    dropped: int = 0
    idle: int = 0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from the start."""
        self.tokens = self.dropped = self.idle = 0
        self.counts = torch.zeros(self.experts, dtype=torch.long)
        self.firsts = torch.zeros(self.experts, dtype=torch.long)

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        """Count a routing with one axis of tokens."""
        chosen = routing.chosen
        self.tokens += len(chosen)
        self.counts += chosen.sum(0).cpu()
        self.firsts += (top(routing.weights, 1) & chosen).sum(0).cpu()
        self.idle += int((~chosen.any(-1)).sum())
        if routing.dropped is not None:
            self.dropped += int(routing.dropped.sum())

    @property
    def active(self) -> float:
        """Experts that a token used, on average."""
        return float(self.counts.sum()) / max(1, self.tokens)

    @property
    def shares(self) -> Tensor:
        """`[N]`, of the tokens that each expert computed."""
        return self.counts / max(1, self.tokens)

    @property
    def imbalance(self) -> float:
        """Largest over mean load; 1 is balanced."""
        return float(self.counts.max() / self.counts.double().mean().clamp_min(1e-30))
