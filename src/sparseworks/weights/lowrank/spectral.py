"""The linear layer U diag(s) V^T of which only some singular vectors train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparseworks.weights.lowrank.layers import Factored, Parts, autocast, decomposed, linear

__all__ = ["SpectralLinear"]


class SpectralLinear(Factored):
    """y = ((x V) * s) U^T + b, with k = min(out, in) singular values.

    All of s trains; of U `[out, k]` and V `[in, k]` the columns `chosen`, which are the parameters
    `left` and `right`. What an optimizer makes of those goes into U and V by `take`.

    Args:
        weight: what the layer starts as, exactly.
        bias: b, kept as it is.
        rank: how many singular vectors train at a time.
        enhanced: gradients of the vectors without the factor s_i that the chain rule gives.
    """

    left_vectors: Tensor
    right_vectors: Tensor
    chosen: Tensor
    kinds: ClassVar[Mapping[str, str]] = {
        "left_vectors": "factors", "right_vectors": "factors", "values": "factors",
        "left": "factors", "right": "factors", "chosen": "indices",
    }  # fmt: skip

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, rank: int, enhanced: bool = True
    ) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        u, s, v = (t.to(weight.dtype) for t in decomposed(weight))
        self.register_buffer("left_vectors", u.contiguous())
        self.register_buffer("right_vectors", v.t().contiguous())
        self.register_buffer("chosen", torch.arange(rank, device=weight.device))
        self.values = nn.Parameter(s)
        self.left, self.right = (
            nn.Parameter(u[:, :rank].clone()),
            nn.Parameter(v[:rank].t().clone()),
        )
        self.bias, self.enhanced = bias, enhanced
        self.kept: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        given = (self.left_vectors, self.right_vectors, self.values, self.left, self.right)
        x, u, v, s, left, right = autocast(x, *given)
        flat = x.reshape(-1, self.in_features)
        y: Tensor = _Spectral.apply(flat, u, v, s, left, right, self.chosen, self.enhanced)  # type: ignore[no-untyped-call]
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def take(self) -> None:
        """After an optimizer step: s at least 0, unit vectors, and these in U and V."""
        self.values.clamp_(min=0)
        for part, whole in ((self.left, self.left_vectors), (self.right, self.right_vectors)):
            part.div_(part.norm(dim=0, keepdim=True).clamp_min(1e-12))
            whole.index_copy_(1, self.chosen, part)

    @torch.no_grad()
    def choose(self, chosen: Tensor) -> None:
        """Other vectors train from now on."""
        self.chosen.copy_(chosen)
        self.left.copy_(self.left_vectors[:, self.chosen])
        self.right.copy_(self.right_vectors[:, self.chosen])

    @torch.no_grad()
    def decompose(self) -> None:
        """U and V orthogonal again: the SVD of the weight that they make now."""
        u, s, v = decomposed(self.weight_of())
        self.left_vectors.copy_(u)
        self.right_vectors.copy_(v.t())
        self.values.copy_(s)
        self.choose(self.chosen)

    @torch.no_grad()
    def weight_of(self) -> Tensor:
        """U diag(s) V^T of the components that are kept."""
        s = self.values[: self.kept]
        u, v = self.left_vectors[:, : self.kept], self.right_vectors[:, : self.kept]
        return (u * s) @ v.t()

    @torch.no_grad()
    def halves(self, count: int) -> tuple[Tensor, Tensor]:
        """(`[count, in]`, `[out, count]`), the first components with sqrt(s) in both."""
        root = self.values[:count].sqrt()
        down = (self.right_vectors[:, :count] * root).t().contiguous()
        return down, (self.left_vectors[:, :count] * root).contiguous()

    @torch.no_grad()
    def parts(self) -> tuple[nn.Module, dict[str, Tensor]]:
        down, up = self.halves(len(self.values))
        kept = len(self.values) if self.kept is None else self.kept
        masks = {n: torch.ones_like(t, dtype=torch.bool) for n, t in
                 (("down.weight", down), ("up.weight", up))}  # fmt: skip
        masks["down.weight"][kept:] = False
        masks["up.weight"][:, kept:] = False
        return Parts(linear(down), linear(up, self.bias), None, None), masks

    def thin(self) -> nn.Module:
        """Ordinary layers of the kept components alone; one dense layer where that is smaller."""
        kept = len(self.values) if self.kept is None else self.kept
        if kept * (self.in_features + self.out_features) >= self.in_features * self.out_features:
            return self.merged()
        down, up = self.halves(kept)
        return Parts(linear(down), linear(up, self.bias), None, None)

    def counted(self) -> tuple[int, int]:
        count = len(self.values)
        return count if self.kept is None else self.kept, count


class _Spectral(torch.autograd.Function):
    """dU_I = G V_I, dV_I = G^T U_I (times s_I, where not enhanced) without G = dy^T x itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, v: Tensor, s: Tensor, left: Tensor, right: Tensor,
        chosen: Tensor, enhanced: bool,
    ) -> Tensor:  # fmt: skip
        inner = x @ v
        ctx.save_for_backward(x, inner, u, v, s, chosen)
        ctx.enhanced = enhanced
        return (inner * s) @ u.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, u, v, s, chosen = ctx.saved_tensors
        outer = dy @ u
        dx = (outer * s) @ v.t() if ctx.needs_input_grad[0] else None
        ds = (inner * outer).sum(0)
        mine, theirs = inner[:, chosen], outer[:, chosen]
        if not ctx.enhanced:
            mine, theirs = mine * s[chosen], theirs * s[chosen]
        return dx, None, None, ds, dy.t() @ mine, x.t() @ theirs, None, None
