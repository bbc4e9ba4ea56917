"""The experts of a layer: N MLPs of one shape in banks `[N, out, in]`, as transformers has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.experts.products import Weights, grouped, whole
from sparseworks.experts.routing import Pairs, Routing

__all__ = ["ACTIVATIONS", "Experts"]

ACTIVATIONS: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}


class Experts(nn.Module):
    """E_i(x) = W_down,i (act(W_gate,i x) * W_up,i x), or W_down,i act(W_up,i x) where not gated.

    Args:
        count: N.
        width: d, of inputs and outputs.
        hidden: e, of each expert.
        gated: with gates, in one bank `gate_up_proj` `[N, 2e, d]`, gates first (Mixtral, Qwen);
            without them the bank is `up_proj` `[N, e, d]`. The second is `down_proj` `[N, d, e]`.
        activation: a name of `ACTIVATIONS`.
        bias: with `up_bias` `[N, e or 2e]` and `down_bias` `[N, d]`.
        generator: of the first values, uniform as those of nn.Linear.
        dtype, device: of the banks.
    """

    def __init__(
        self,
        count: int,
        width: int,
        hidden: int,
        *,
        gated: bool = True,
        activation: str = "silu",
        bias: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if min(count, width, hidden) < 1:
            raise InvalidArgument(f"experts={count} of {width} x {hidden}: all must be at least 1")
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise InvalidArgument(f"activation={activation!r} of experts; there are {known}")
        self.count, self.width, self.hidden = count, width, hidden
        self.gated, self.activation = gated, activation
        inner = 2 * hidden if gated else hidden

        def bank(limit: int, *shape: int) -> nn.Parameter:
            made = torch.rand(shape, generator=generator, dtype=torch.float32)
            made = (2 * made - 1) / limit**0.5
            return nn.Parameter(made.to(device, dtype or torch.get_default_dtype()))

        self.first = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(self.first, bank(width, count, inner, width))
        self.down_proj = bank(hidden, count, width, hidden)
        self.up_bias = bank(width, count, inner) if bias else None
        self.down_bias = bank(hidden, count, width) if bias else None

    @property
    def weights(self) -> Weights:
        """First and second bank and their biases."""
        first: Any = getattr(self, self.first)
        return first, self.down_proj, self.up_bias, self.down_bias

    def forward(self, x: Tensor, routing: Routing, *, dense: bool = False) -> Tensor:
        """y_t = sum over chosen i of w_ti E_i(x_t).

        Args:
            x: `[T, d]`.
            routing: of these tokens.
            dense: compute every expert for every token, which pays where most are chosen or experts
                are narrow; the result is the same.
        """
        act = ACTIVATIONS[self.activation]
        x, w = _cast(x, self.weights)
        weights = routing.weights.to(x.dtype)
        if dense:
            return whole(x, weights * routing.chosen, w, act, self.gated)
        pairs = Pairs.of(routing.chosen)
        y = grouped(x[pairs.token], pairs.counts, w, act, self.gated)
        y = y * weights[pairs.token, pairs.expert, None]
        return x.new_zeros(len(x), self.width).index_add(0, pairs.token, y)

    def extra_repr(self) -> str:
        kind = f"gated {self.activation}" if self.gated else self.activation
        return f"{self.count} x ({self.width} -> {self.hidden} {kind})"


def _cast(x: Tensor, w: Weights) -> tuple[Tensor, Weights]:
    """In the type of autocast, where it is on."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, w
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), tuple(None if t is None else t.to(dtype) for t in w)  # type: ignore[return-value]
