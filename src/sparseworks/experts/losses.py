"""Losses on routings: balance of load, and size of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseworks.experts.routing import Routing, top

__all__ = ["load_balance", "z_loss"]


def load_balance(routing: Routing, *, first: bool = False) -> Tensor:
    """N sum_i F_i P_i (Fedus et al. 2022, Switch Transformers): 1 where the load is balanced.

    F_i is the share of choices that fall on expert i, before any is dropped; P_i the mean of the
    router's probability of i. Only P has a gradient.

    Args:
        first: count only each token's most probable expert (GShard, DeepSpeed).
    """
    n = routing.experts
    p = routing.probabilities.reshape(-1, n)
    counted = top(p.detach(), 1) if first else routing.wanted.reshape(-1, n)
    share = counted.sum(0).to(p.dtype) / counted.sum().clamp_min(1)
    return n * (share * p.mean(0)).sum()


def z_loss(routing: Routing) -> Tensor:
    """mean_t (log sum_i exp z_ti)^2 (Zoph et al. 2022, ST-MoE)."""
    return torch.logsumexp(routing.logits, dim=-1).square().mean()
