"""The linear layer of a low-rank path beside a few dense input channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import ModelError
from sparseworks.weights.lowrank.layers import Factored, Parts, linear

__all__ = ["ChannelLowRankLinear"]


class ChannelLowRankLinear(Factored):
    """y = gamma B f(A x) + (1 - gamma) W x[I] + b.

    Args:
        up: B `[out, rank]`.
        down: A `[rank, in]`.
        columns: W `[out, K]`.
        channels: I `[K]`, rising.
        bias: b, kept as it is.
        gamma: weight of the low-rank path.
        between: f; None: the identity.
    """

    channels: Tensor
    kinds: ClassVar[Mapping[str, str]] = {
        "up": "factors", "down": "factors", "columns": "values", "channels": "indices"
    }  # fmt: skip

    def __init__(
        self,
        up: Tensor,
        down: Tensor,
        columns: Tensor,
        channels: Tensor,
        bias: nn.Parameter | None,
        gamma: float,
        between: nn.Module | None,
    ) -> None:
        super().__init__(down.shape[1], len(up))
        self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())
        self.columns, self.bias = nn.Parameter(columns.clone()), bias
        self.register_buffer("channels", channels.to(device=up.device, dtype=torch.int32))
        self.gamma, self.between = gamma, between

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.down)
        hidden = hidden if self.between is None else self.between(hidden)
        low = F.linear(hidden, self.up)
        some = F.linear(x.index_select(-1, self.channels), self.columns, self.bias_of_sparse())
        return self.gamma * low + (1 - self.gamma) * some

    def bias_of_sparse(self) -> Tensor | None:
        """b / (1 - gamma): it goes with the product that is weighted so."""
        return None if self.bias is None else self.bias / (1 - self.gamma)

    @torch.no_grad()
    def weight_of(self) -> Tensor:
        if self.between is not None:
            raise ModelError(
                f"a low-rank path with {type(self.between).__name__} in it is no matrix and cannot "
                "be merged into one; keep its parts, or train it with activation='identity'"
            )
        return (self.gamma * self.up @ self.down).add_(self.sparse_part())

    @torch.no_grad()
    def sparse_part(self) -> Tensor:
        """(1 - gamma) W in its columns of a dense `[out, in]`."""
        sparse = self.columns.new_zeros(self.out_features, self.in_features)
        return sparse.index_copy_(1, self.channels.long(), (1 - self.gamma) * self.columns)

    @torch.no_grad()
    def parts(self) -> tuple[nn.Module, dict[str, Tensor]]:
        sparse = self.sparse_part()
        mask = torch.zeros_like(sparse, dtype=torch.bool)
        mask[:, self.channels.long()] = True
        up = linear(self.gamma * self.up)
        made = Parts(linear(self.down), up, linear(sparse, self.bias), self.between)
        return made, {"sparse.weight": mask}

    def counted(self) -> tuple[int, int]:
        return self.columns.numel(), self.out_features * self.in_features
