"""Hybrid sparsification of a residual stream: what PAT trains (see `pat`).

    out = v * m(t) * (x + L1 L0 x),   m = sigmoid(tau a) + b,
    tau = 1 / (1 - ln t / ln G + 1e-6),   b = max(1/2 - t / G, 0)

behind the embedding and behind what attention and MLP of each layer add to the stream. The mask m
`[d]` is one for all; v `[d]`, L0 `[e, d]` and L1 `[d, e]` are of each place. From t = 0.8 G on tau
rests and a gets no gradient through m.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.random import generator_for
from sparseworks.models.blocks import first_tensor
from sparseworks.training.gates import straight_through

__all__ = ["HybridSparsification"]

_FROZEN = 0.8  # share of G at which the mask has chosen


class HybridSparsification(nn.Module):
    """The modules of all places, with their mask.

    Args:
        width: d.
        places: how many modules.
        rank: e.
        anneal: G, in steps.
        seed: of L0, drawn as Kaiming's normal.
    """

    def __init__(
        self, width: int, places: int, rank: int, anneal: int, seed: int, like: Tensor
    ) -> None:
        super().__init__()
        self.width, self.anneal, self.step = width, anneal, 0
        self.logits = nn.Parameter(like.new_zeros(width))
        self.gain, self.down, self.up = (nn.ParameterList() for _ in range(3))
        for i in range(places):
            drawn = torch.randn(rank, width, generator=generator_for(seed, f"HSM {i}"))
            self.down.append(nn.Parameter((drawn * math.sqrt(2 / width)).to(like)))
            self.up.append(nn.Parameter(like.new_zeros(width, rank)))
            self.gain.append(nn.Parameter(like.new_ones(width)))
        self.hard: Tensor | None = None
        self._mask: Tensor | None = None

    @property
    def temperature(self) -> float:
        """tau."""
        t = min(max(self.step, 1), _FROZEN * self.anneal)
        return 1 / (1 - math.log(max(t, 1)) / math.log(self.anneal) + 1e-6)

    @property
    def offset(self) -> float:
        """b."""
        return max(0.5 - self.step / self.anneal, 0.0)

    def mask(self) -> Tensor:
        """m of this step, or the hard one once it is chosen."""
        if self.hard is not None:
            return self.hard.to(self.logits.dtype)
        chosen = self.step >= _FROZEN * self.anneal
        logits = self.logits.detach() if chosen else self.logits
        return torch.sigmoid(self.temperature * logits) + self.offset

    def apply_at(self, place: int, x: Tensor) -> Tensor:
        """What the module of a place makes of hidden states."""
        if place == 0 or self._mask is None:
            self._mask = self.mask()
        low = (x @ self.down[place].t()) @ self.up[place].t()
        made: Tensor = self.gain[place] * self._mask * (x + low)
        return made

    def penalty(self, target: int, weight: float) -> Tensor:
        """weight |sum 1[a >= 0] - d'| / d', passed straight through; what keeps a near +-1/2; and
        the rows of every L0 orthonormal."""
        a = self.logits
        count = straight_through(a >= 0, a).sum()
        total = weight * (count - target).abs() / target
        for side, goal in ((a > 0, 0.5), (a <= 0, -0.5)):
            if bool(side.any()):  # the mean over nothing is not a number
                total = total + (a[side] - goal).square().mean()
        for down in self.down:
            eye = torch.eye(len(down), dtype=down.dtype, device=down.device)
            total = total + (down @ down.t() - eye).square().mean()
        return total

    @torch.no_grad()
    def harden(self, target: int) -> Tensor:
        """Keep the `target` largest a; their indices, ascending."""
        kept = self.logits.argsort(descending=True, stable=True)[:target].sort().values
        self.hard = torch.zeros_like(self.logits, dtype=torch.bool)
        self.hard[kept] = True
        self._mask = None
        return kept

    @torch.no_grad()
    def basis(self, place: int, kept: Tensor) -> Tensor:
        """A^T[:, keep] `[d, d']` in fp64, A = diag(v) (I + L1 L0): what is written there is turned
        by it."""
        eye = torch.eye(self.width, dtype=torch.float64, device=self.logits.device)
        whole = eye + self.up[place].double() @ self.down[place].double()
        turned: Tensor = (self.gain[place].double()[:, None] * whole)[kept].t()
        return turned

    def handles(self, embedding: nn.Module, layers: Iterable[Any]) -> Iterable[Any]:
        """Put the modules on, one at a time; gives the handles that take them off."""

        def after(place: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                hidden = first_tensor(output)
                assert hidden is not None
                made = self.apply_at(place, hidden)
                return (made, *output[1:]) if isinstance(output, tuple) else made

            return hook

        yield embedding.register_forward_hook(after(0))
        for i, layer in enumerate(layers):
            yield layer.self_attn.register_forward_hook(after(2 * i + 1))
            yield layer.mlp.register_forward_hook(after(2 * i + 2))
