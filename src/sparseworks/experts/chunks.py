"""How sparse routing is for runs of tokens, which is what decoding several tokens at once loads."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument

__all__ = ["chunk_sparsity", "token_information"]


def chunk_sparsity(chosen: Tensor, length: int = 1) -> float:
    """CLS_m = 1 - mean over chunks of m tokens of the share of experts that any of them uses.

    With m = 1 it is the sparsity of single tokens (TLS), which no longer chunk exceeds. A last
    chunk that is not full is left out.

    Args:
        chosen: bool `[..., tokens, N]`; chunks do not cross the leading axes.
        length: m.
    """
    tokens = chosen.shape[-2]
    if not 1 <= length <= tokens:
        raise InvalidArgument(f"chunks of {length} tokens of {tokens}")
    whole = chosen[..., : tokens // length * length, :]
    union = whole.reshape(-1, length, chosen.shape[-1]).any(1)
    return 1.0 - float(union.double().mean())


def token_information(tokens: Tensor, experts: Tensor) -> float:
    """Mutual information in nats of tokens and the experts they go to; 0 for constant routing.

    Args:
        tokens, experts: integers of one shape.
    """
    tokens, experts = tokens.flatten(), experts.flatten()
    n = int(experts.max()) + 1
    joint = torch.bincount(tokens * n + experts, minlength=(int(tokens.max()) + 1) * n).double()
    p = joint.view(-1, n) / joint.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    seen = p > 0
    return float((p[seen] * (p[seen] / independent[seen]).log()).sum())
