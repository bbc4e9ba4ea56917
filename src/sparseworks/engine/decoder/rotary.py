"""Rotary position embeddings as tables, for every kind of scaling that transformers has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Rotary", "read_rotary"]


@dataclass(frozen=True)
class Rotary:
    """cos and sin of position * frequency, times `scaling`.

    Args:
        frequencies: fp32 `[dims / 2]`, radians a position.
        scaling: of cos and sin.
        limit: positions from which on `long` serves, or beyond which (without it) there are none.
        long: frequencies of texts longer than `limit` (LongRoPE).
    """

    frequencies: Tensor
    scaling: float = 1.0
    limit: int | None = None
    long: Tensor | None = None

    def table(self, first: int, last: int, length: int | None = None) -> Tensor:
        """`[last - first, dims]`: cosines, then sines, in a text of `length` tokens."""
        beyond = self.long is not None and length is not None and length > (self.limit or 0)
        frequencies = self.long if beyond else self.frequencies
        assert frequencies is not None
        angle = torch.arange(first, last).float()[:, None] * frequencies
        return torch.cat([angle.cos(), angle.sin()], 1) * self.scaling


def read_rotary(module: nn.Module, config: Any, layer_type: str | None = None) -> Rotary:
    """Of a rotary module of transformers.

    Raises:
        AttributeError: it has no frequencies.
    """
    prefix = f"{layer_type}_" if layer_type and hasattr(module, f"{layer_type}_inv_freq") else ""
    kind = getattr(module, "rope_type", "default")
    if isinstance(kind, dict):
        kind = kind.get(layer_type, "default")
    found = getattr(module, f"{prefix}inv_freq").detach().float().clone()
    scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    if kind == "dynamic":  # beyond its first length every step turns by other angles
        return Rotary(found, scaling, int(config.max_position_embeddings))
    if kind != "longrope":
        return Rotary(found, scaling)
    parameters = getattr(config, "rope_parameters", None) or config.rope_scaling
    limit = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    probe = torch.zeros(1, 1, 1)
    module(probe, torch.tensor([[int(limit) + 1]]))  # the module itself knows what then holds
    long = getattr(module, f"{prefix}inv_freq").detach().float().clone()
    module(probe, torch.tensor([[0]]))
    return Rotary(found, scaling, int(limit), long)
