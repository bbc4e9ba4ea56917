"""One sparse linear layer by itself: Y = X W^T + b for any number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.engine.ir import Load, Product, Store, Value
from sparseworks.engine.part import Part

__all__ = ["SparseLinear"]


class SparseLinear(nn.Module):
    """y = W x + b that skips the zeros of W; inference only.

    Args:
        weight: fp32 `[outputs, inputs]`, finite.
        bias: `[outputs]` or None.
        threads: of the native kernel; None: as many as torch uses.

    Attributes:
        kept: weights that are not zero.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, threads: int | None = None) -> None:
        super().__init__()
        if weight.ndim != 2 or weight.dtype != torch.float32 or not weight.numel():
            raise InvalidArgument(
                f"a sparse linear layer takes an fp32 matrix, not {weight.dtype} "
                f"{list(weight.shape)}"
            )
        if not bool(torch.isfinite(weight).all()):
            raise InvalidArgument("the weight holds NaN or Inf")
        self.out_features, self.in_features = weight.shape
        self.kept = int(torch.count_nonzero(weight))
        x = Value("tokens", self.in_features)
        y = Value("tokens", self.out_features)
        bias = None if bias is None else bias.detach()
        product = Product(y, x, weight.detach().contiguous(), bias, "weight")
        count = torch.get_num_threads() if threads is None else threads
        self.part = Part("tokens", [Load(x, "x"), product, Store(y, "y")], ["x"], [], ["y"], count)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` fp32 to `[..., outputs]`."""
        if x.dtype != torch.float32 or x.shape[-1] != self.in_features:
            raise InvalidArgument(
                f"the input is {x.dtype} {list(x.shape)}; the layer reads fp32 [..., "
                f"{self.in_features}]"
            )
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return self.part.run({"x": x.detach()}, {})["y"]

    def extra_repr(self) -> str:
        sparsity = 1 - self.kept / (self.in_features * self.out_features)
        return f"{self.in_features}, {self.out_features}, sparsity={sparsity:.3f}"
