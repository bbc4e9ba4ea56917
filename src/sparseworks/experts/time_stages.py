"""A denoiser for each part of the diffusion time (Luo, Xiang et al. 2023): of S models, that with

    s = floor(t S / T)

runs at the original time t of T. The router has no parameters, and a sampler that skips times is
routed by the time, not by the number of its step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument

__all__ = ["TimeStages"]


class TimeStages(nn.Module):
    """Models that share out the times 0..T - 1, called as each of them.

    Args:
        models: S, for rising times; they take (x, t, ...) and give a tensor.
        times: T.
    """

    def __init__(self, models: Iterable[nn.Module], times: int = 1000) -> None:
        super().__init__()
        self.models, self.times = nn.ModuleList(models), times
        if not 1 <= len(self.models) <= times:
            raise InvalidArgument(f"{len(self.models)} models for times={times}")

    def stage(self, t: Tensor) -> Tensor:
        """s of integer times.

        Raises:
            InvalidArgument: a time outside 0..T - 1, or not an integer.
        """
        if t.is_floating_point() or bool(((t < 0) | (t >= self.times)).any()):
            raise InvalidArgument(f"times: integers from 0 to {self.times - 1}")
        return t * len(self.models) // self.times

    def draw(self, stage: int, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Uniform times of one stage, for its training."""
        n = len(self.models)
        low, high = -(-stage * self.times // n), -(-(stage + 1) * self.times // n)
        return torch.randint(low, high, (count,), generator=generator)

    def forward(self, x: Tensor, t: Tensor, *more: Any) -> Tensor:
        """Every sample `[batch, ...]` by the model of its time `[batch]`.

        Args:
            more: tensors with the same first axis go with their samples; all else to every model.
        """
        stages = self.stage(t)
        out: Tensor | None = None
        for s in sorted(set(stages.tolist())):
            rows = (stages == s).nonzero().squeeze(1)
            own = [m[rows] if isinstance(m, Tensor) and m.shape[:1] == t.shape else m for m in more]
            y = self.models[s](x[rows], t[rows], *own)
            out = y.new_empty(len(x), *y.shape[1:]) if out is None else out
            out = out.index_copy(0, rows, y)
        return x if out is None else out
