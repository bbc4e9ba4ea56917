"""One sparse linear layer by itself: Y = X W^T + b for any number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.engine.ir import Load, Product, Store, Value
from sparseworks.engine.part import Part
from sparseworks.engine.shared import Shared
from sparseworks.kernels import available

__all__ = ["SparseLinear"]


class SparseLinear(nn.Module):
    """y = W x + b that skips the zeros of W; inference only. Without native kernels torch serves.

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
        self.native = available()
        x = Value("tokens", self.in_features)
        y = Value("tokens", self.out_features)
        bias = None if bias is None else bias.detach()
        self.product = product = Product(y, x, weight.detach().contiguous(), bias, "weight")
        count = torch.get_num_threads() if threads is None else threads
        shared = Shared()  # by both
        self.rows, self.positions = (
            Part(
                "tokens",
                [Load(x, "x", columns=c), product, Store(y, "y", columns=c)],
                ["x"], [], ["y"], count, shared=shared,
            )
            for c in (False, True)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` fp32 to `[..., outputs]`."""
        self._check(x, x.shape[-1:], "[..., {}]")
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        if not self.native:
            return F.linear(x.detach(), self.product.weight, self.product.bias)
        return self.rows.run({"x": x.detach()}, {})["y"]

    def columns(self, x: Tensor) -> Tensor:
        """W x + b of the columns of a matrix: `[inputs, n]` fp32 to `[outputs, n]`.

        Channels come first in memory as the kernel reads them, so nothing is transposed.
        """
        self._check(x, x.shape[:1] if x.ndim == 2 else x.shape[:0], "[{}, n]")
        if x.numel() == 0:
            return x.new_zeros(self.out_features, x.shape[1])
        if not self.native:
            return self.forward(x.t()).t()
        return self.positions.columns(x.detach(), self.out_features)

    def _check(self, x: Tensor, inputs: torch.Size, shape: str) -> None:
        if x.dtype != torch.float32 or inputs != (self.in_features,):
            raise InvalidArgument(
                f"the input is {x.dtype} {list(x.shape)}; the layer reads fp32 "
                f"{shape.format(self.in_features)}"
            )

    def __reduce__(self) -> Any:
        """Made anew from bytes: its programs read memory that must stay where it is."""
        product = self.product
        bias = None if product.bias is None else product.bias.numpy()
        return _made, (type(self), product.weight.numpy(), bias, self.rows.threads)

    def extra_repr(self) -> str:
        sparsity = 1 - self.kept / (self.in_features * self.out_features)
        return f"{self.in_features}, {self.out_features}, sparsity={sparsity:.3f}"


def _made(kind: type[SparseLinear], weight: Any, bias: Any, threads: int) -> SparseLinear:
    found = None if bias is None else torch.from_numpy(bias.copy())
    return kind(torch.from_numpy(weight.copy()), found, threads)
