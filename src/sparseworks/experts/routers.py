"""Routers: from tokens to a `Routing`. Methods add theirs; here are the base and top-k."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.experts.routing import Routing, top

__all__ = ["Router", "TopK"]


class Router(nn.Module, ABC):
    """z = W x, computed in fp32 at least from there on.

    Args:
        experts: N.
        width: d.
        generator: of the first values, normal with deviation 0.02.
        dtype, device: of W `[N, d]`.
    """

    attends = False
    """Whether `forward` takes the attention of the block before."""

    def __init__(
        self,
        experts: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        weight = 0.02 * torch.randn(experts, width, generator=generator, dtype=torch.float32)
        self.weight = nn.Parameter(weight.to(device, dtype or torch.get_default_dtype()))

    def logits(self, x: Tensor) -> Tensor:
        """z `[..., N]`."""
        z = F.linear(x, self.weight.to(x.dtype))
        return z.to(torch.promote_types(z.dtype, torch.float32))

    @abstractmethod
    def forward(self, x: Tensor, attention: Tensor | None = None) -> Routing:
        """The decision for inputs `[..., length, d]`.

        Args:
            attention: `[batch, heads, length, length]` of the block before, where it `attends`.
        """

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]} experts"


class TopK(Router):
    """w = the k largest of softmax(z), divided by their sum unless `renormalize` is off.

    Args:
        k: experts of a token.
        noise: deviation of normal noise on the logits, in training only.
    """

    def __init__(
        self, experts: int, width: int, k: int = 2, *, renormalize: bool = True,
        noise: float = 0.0, generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(experts, width, generator=generator, dtype=dtype, device=device)
        if not 1 <= k <= experts:
            raise InvalidArgument(f"top_k={k} must be in 1..experts={experts}")
        self.k, self.renormalize, self.noise = k, renormalize, noise

    def forward(self, x: Tensor, attention: Tensor | None = None) -> Routing:
        z = self.logits(x)
        if self.training and self.noise:
            z = z + self.noise * torch.randn_like(z)
        return self.choose(z.softmax(-1), z)

    def choose(self, p: Tensor, z: Tensor) -> Routing:
        """The k most probable experts of distributions p that logits z gave."""
        chosen = top(p.detach(), self.k)
        weights = p * chosen
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(weights, chosen, p, z)
