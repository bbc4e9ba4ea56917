"""Linear layers that are trained as factors: a low-rank product and a sparse rest.

| layer | weight | trained |
| --- | --- | --- |
| `SparseLowRankLinear` | scale B A + S, S at fixed places | B, A, the values of S |

None of them stores a dense weight. `parts` makes ordinary linear layers of one (the sparse one with
its zeros and their mask), `merged` one dense linear layer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.weights.lowrank.product import BLOCK_BYTES, blocks_of, sparse_low_rank

__all__ = ["Factored", "Memory", "Parts", "SparseLowRankLinear", "autocast", "decomposed",
           "linear", "random_support"]  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes of a layer's tensors; those of gradients and optimizer state go with `trained`.

    Attributes:
        values: of the sparse part.
        indices: where they are.
        factors: of the low-rank part.
        rest: bias, scale.
        dense: a dense layer of this shape and dtype, bias included.
        trained: numbers (not bytes) that take gradients.
    """

    values: int
    indices: int
    factors: int
    rest: int
    dense: int
    trained: int

    @property
    def total(self) -> int:
        return self.values + self.indices + self.factors + self.rest

    def __add__(self, other: Memory) -> Memory:
        mine, theirs = vars(self), vars(other)
        return Memory(**{k: mine[k] + theirs[k] for k in mine})

    def __str__(self) -> str:
        def mb(value: int) -> str:
            return f"{value / 1e6:.2f} MB"

        return (
            f"{mb(self.total)} (low rank {mb(self.factors)}, sparse values {mb(self.values)}, "
            f"indices {mb(self.indices)}, rest {mb(self.rest)}) for {mb(self.dense)} dense"
        )


class Parts(nn.Module):
    """y = sparse(x) + up(f(down(x))) of ordinary linear layers.

    Args:
        down, up: the low-rank path.
        sparse: the sparse one, with the bias; None: nothing.
        between: f; None: the identity.
    """

    def __init__(
        self, down: nn.Linear, up: nn.Linear, sparse: nn.Linear | None, between: nn.Module | None
    ) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.sparse, self.between = sparse, between

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(x)
        y: Tensor = self.up(hidden if self.between is None else self.between(hidden))
        return y if self.sparse is None else y + self.sparse(x)


class Factored(nn.Module):
    """Base of the layers. Their tensors are what `state_dict` has, so that saving loses no bit."""

    bias: nn.Parameter | None
    kinds: ClassVar[
        Mapping[str, str]
    ] = {}  # tensor name -> field of `Memory`; what is not named is the rest

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def memory(self) -> Memory:
        """What the layer's tensors take, exactly."""
        found = dict.fromkeys(("values", "indices", "factors", "rest"), 0)
        item = 4
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            found[self.kinds.get(name, "rest")] += tensor.numel() * tensor.element_size()
            item = tensor.element_size() if tensor.is_floating_point() else item
        biases = 0 if self.bias is None else self.out_features
        dense = (self.out_features * self.in_features + biases) * item
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return Memory(**found, dense=dense, trained=trained)

    @abstractmethod
    def weight_of(self) -> Tensor:
        """The dense weight `[out, in]`.

        Raises:
            ModelError: the layer is not linear.
        """

    @abstractmethod
    def parts(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """Ordinary layers that compute the same, and the masks of their sparse weights by name."""

    @abstractmethod
    def counted(self) -> tuple[int, int]:
        """(kept, of how many) weights of what is sparse."""

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One dense linear layer that computes the same."""
        return linear(self.weight_of(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class SparseLowRankLinear(Factored):
    """y = x (scale B A + S)^T + b, with S as values at fixed places.

    Args:
        in_features, out_features: of the layer.
        rank: r.
        indices: places of S in the flat `[out, in]`, rising; kept as int32 where that is enough.
        scale: of B A.
        learned_scale: it is tanh(scale) and trains.
        bias: has b.
        dtype, device: of the parameters.

    The factors and values are not initialised here.
    """

    indices: Tensor
    kinds = {"up": "factors", "down": "factors", "values": "values", "indices": "indices"}  # noqa: RUF012

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        indices: Tensor,
        *,
        scale: float = 1.0,
        learned_scale: bool = False,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        size = in_features * out_features
        if not 1 <= rank <= min(in_features, out_features):
            raise InvalidArgument(
                f"rank={rank} must be in [1, {min(in_features, out_features)}], the smaller side "
                f"of the layer [{out_features}, {in_features}]"
            )
        edges = torch.tensor([-1]), indices.cpu().reshape(-1).long(), torch.tensor([size])
        if indices.ndim != 1 or not bool((torch.cat(edges).diff() > 0).all()):
            raise InvalidArgument(
                f"the places of S must rise from 0 to below {size} without a repeated one"
            )
        kind = torch.int32 if size < 2**31 else torch.int64
        self.register_buffer("indices", indices.to(device=device, dtype=kind))
        like = {"dtype": dtype, "device": device}
        self.up = nn.Parameter(torch.empty(out_features, rank, **like))  # type: ignore[arg-type]
        self.down = nn.Parameter(torch.empty(rank, in_features, **like))  # type: ignore[arg-type]
        self.values = nn.Parameter(torch.empty(len(indices), **like))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(out_features, **like)) if bias else None  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.tensor(scale, **like)) if learned_scale else None  # type: ignore[arg-type]
        self.fixed_scale = scale

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def scaled(self) -> Tensor:
        """scale A."""
        return self.down * (self.fixed_scale if self.scale is None else torch.tanh(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        x, up, down, values = autocast(x, self.up, self.scaled(), self.values)
        y = sparse_low_rank(x, up, down, values, self.indices)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def sparse_part(self) -> Tensor:
        """S, dense."""
        sparse = self.values.new_zeros(self.out_features * self.in_features)
        sparse[self.indices.long()] = self.values
        return sparse.view(self.out_features, self.in_features)

    @torch.no_grad()
    def weight_of(self) -> Tensor:
        return (self.up @ self.scaled()).add_(self.sparse_part())

    @torch.no_grad()
    def parts(self) -> tuple[nn.Module, dict[str, Tensor]]:
        sparse = self.sparse_part()
        mask = torch.zeros_like(sparse, dtype=torch.bool)
        mask.view(-1)[self.indices.long()] = True
        made = Parts(linear(self.scaled()), linear(self.up), linear(sparse, self.bias), None)
        return made, {"sparse.weight": mask}

    def counted(self) -> tuple[int, int]:
        return len(self.indices), self.out_features * self.in_features

    @torch.no_grad()
    def start_from(self, weight: Tensor) -> None:
        """B A becomes the truncated SVD of a weight, S the rest of it at its places."""
        u, s, v = decomposed(weight)
        root = s[: self.rank].sqrt()
        factor = self.fixed_scale if self.scale is None else math.tanh(float(self.scale))
        self.up.copy_(u[:, : self.rank] * root)
        self.down.copy_(root[:, None] * v[: self.rank] / factor)
        shape = (self.out_features, self.in_features)
        low = self.scaled()
        for rows, part, places in blocks_of(shape, self.indices, weight.itemsize, BLOCK_BYTES):
            rest = weight[rows] - self.up[rows] @ low
            self.values[part] = rest.reshape(-1)[places].to(self.values.dtype)


def decomposed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[out, k]`, s `[k]`, V^T `[k, in]` of a weight, in fp32 at least."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    return u, s, v


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with this weight (and bias), which it keeps."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def autocast(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What the layer multiplies, in the dtype of autocast where that is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return tuple(t.to(dtype) for t in (x, *tensors))
    if any(t.dtype != x.dtype for t in tensors):
        raise ModelError(f"the input is {x.dtype}, the layer {tensors[0].dtype}; convert one")
    return (x, *tensors)


def random_support(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `size` places, rising; every subset is as likely. Memory of the count."""
    if 4 * count > size:
        return torch.randperm(size, generator=generator)[:count].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:  # a set of draws is, given its size, any set of that size
        drawn = torch.randint(size, (count + count // 4 + 8,), generator=generator)
        found = torch.unique(torch.cat([found, drawn]))
    kept = torch.randperm(len(found), generator=generator)[:count]
    return found[kept].sort().values
