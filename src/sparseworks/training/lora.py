"""Low-rank updates beside frozen linear layers (Hu et al. 2021, LoRA: Low-Rank Adaptation of Large
Language Models): y = W x + (alpha / r) B A dropout(x), A `[r, in]`, B `[out, r]` = 0 at the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.random import generator_for

__all__ = ["LowRankUpdates"]


class LowRankUpdates(nn.Module):
    """The updates of some layers; they are at work while `handles` are on.

    Args:
        layers: name -> linear layer.
        rank: r.
        alpha: of the scale alpha / r.
        dropout: of the inputs, in training mode.
        seed: of A, drawn as Kaiming's uniform.
    """

    def __init__(
        self, layers: dict[str, nn.Linear], rank: int, alpha: float, dropout: float, seed: int
    ) -> None:
        super().__init__()
        self.layers = [layers[name] for name in layers]  # a list: they are no part of this module
        self.scale, self.dropout = alpha / rank, dropout
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name, layer in layers.items():
            bound = 1 / math.sqrt(layer.in_features)
            drawn = torch.rand(rank, layer.in_features, generator=generator_for(seed, name))
            start = (2 * drawn - 1) * bound
            self.down.append(nn.Parameter(start.to(layer.weight.device, layer.weight.dtype)))
            self.up.append(nn.Parameter(layer.weight.new_zeros(layer.out_features, rank)))

    def handles(self) -> Iterable[Any]:
        """Put the updates on, one at a time; gives the handles that take them off."""
        for i, layer in enumerate(self.layers):

            def after(module: nn.Module, args: Any, output: Tensor, i: int = i) -> Tensor:
                x = F.dropout(args[0], self.dropout, module.training)
                low = F.linear(F.linear(x, self.down[i]), self.up[i])
                return output + self.scale * low

            yield layer.register_forward_hook(after)

    @torch.no_grad()
    def fold(self) -> None:
        """W <- W + (alpha / r) B A."""
        for layer, down, up in zip(self.layers, self.down, self.up, strict=True):
            update = self.scale * up.double() @ down.double()
            layer.weight.copy_(layer.weight.double() + update)
