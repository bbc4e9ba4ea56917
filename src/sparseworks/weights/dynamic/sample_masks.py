"""Layers whose weight has a mask for every sample, and the generator that makes them: what
`maskunet` puts into a model, whose equation its module gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import ModelError
from sparseworks.core.patterns import Pattern
from sparseworks.core.random import generator_for

__all__ = ["Block", "Generator", "MaskedLinear", "context", "gumbel", "straight_through"]


def context(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """GAP(x) `[batch, channels]` of what a block is called with, and its time `[batch, width]`.

    Of images all count, of a tuple of them the last; the time is the first matrix beside them.
    Without images it is the mean over the tokens of the first tensor.
    """
    given = [v[-1] if isinstance(v, (tuple, list)) and v else v for v in (*args, *kwargs.values())]
    tensors = [t for t in given if isinstance(t, Tensor) and t.is_floating_point()]
    images = [t for t in tensors if t.ndim == 4]
    if images:
        times = [t for t in tensors if t.ndim == 2]
        return torch.cat([t.mean((2, 3)) for t in images], 1).float(), times[0] if times else None
    if not tensors or tensors[0].ndim < 2:
        raise ModelError("maskunet: a block whose first input is no image, tokens or matrix")
    first = tensors[0].float()
    return first.flatten(1, -2).mean(1) if first.ndim > 2 else first, None


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """-log(-log(uniform)), fp32."""
    return torch.rand(shape, generator=generator).clamp_(1e-9, 1 - 1e-7).log_().neg_().log_().neg_()


def straight_through(hard: Tensor, noisy: Tensor, tau: float) -> Tensor:
    """The bool mask as 0 and 1, with the derivative of sigmoid(noisy / tau)."""
    soft = torch.sigmoid(noisy / tau)
    return hard.float() + (soft - soft.detach())


class Generator(nn.Module):
    """M of a block, from its inputs; called before the block is.

    Attributes:
        mean: of M over all samples of the training.
    """

    mean: Tensor
    count: Tensor

    def __init__(
        self, channels: int, time: int, shape: tuple[int, int], hidden: int, offset: float
    ) -> None:
        super().__init__()
        self.shape = shape
        self.inner, self.outer = nn.Linear(channels, hidden), nn.Linear(hidden, shape[0] * shape[1])
        self.time = nn.Linear(time, channels, bias=False) if time else None
        nn.init.kaiming_normal_(self.inner.weight, nonlinearity="relu")
        nn.init.zeros_(self.inner.bias)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, offset)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, h: Tensor, time: Tensor | None) -> Tensor:
        if self.time is not None:
            if time is None:
                raise ModelError("maskunet: a block was called without the time of its example")
            h = h + self.time(time.float())
        m = F.relu(self.outer(F.relu(self.inner(h)))).view(-1, *self.shape)
        if self.training:
            with torch.no_grad():
                self.count += len(m)
                self.mean += (m.sum(0) - len(m) * self.mean) / self.count
        return m


class Block:
    """What the masked layers of one block share: its generator, and M of the call at work.

    It is the hook before the block, an object so that a copy of the model has its own.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.now: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"generator": self.generator, "now": None}  # M of a call belongs to its graph

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.now = self.generator(*context(args, kwargs))


class MaskedLinear(nn.Linear):
    """A linear layer whose weight has a mask for every sample.

    Args:
        plain: the layer, whose parameters these are.
        name: of its weight, for the noise.
        block: it is in.
        owner: the block's generator is a part of this layer.
        pattern, keep: the legal masks and the units kept, or (None, 0): those above 0.
        bias: c, and b, at first.
        tau: temperature.
        seed: of the noise.
    """

    draws: Tensor

    def __init__(
        self, plain: nn.Linear, name: str, block: Block, owner: bool, pattern: Pattern | None,
        keep: int, bias: float, tau: float, seed: int,
    ) -> None:  # fmt: skip
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        self.bias = plain.bias
        rows, columns = block.generator.shape
        at = plain.weight.device
        self.rows = nn.Linear(rows, plain.out_features, device=at)
        self.columns = nn.Linear(columns, plain.in_features, device=at)
        for part in (self.rows, self.columns):
            nn.init.zeros_(part.weight)
            nn.init.constant_(part.bias, bias)
        if owner:
            self.generator = block.generator
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.block, self.name, self.pattern, self.keep = block, name, pattern, keep
        self.tau, self.seed = tau, seed
        self.last: Tensor | None = None  # masks of the last call in evaluation mode

    def logits(self, m: Tensor) -> Tensor:
        """L `[batch, out, in]` from M."""
        found: Tensor = self.columns(self.rows(m.transpose(1, 2)).transpose(1, 2))
        return found

    def hard(self, logits: Tensor) -> Tensor:
        """The bool masks of these logits."""
        if self.pattern is None:
            return logits > 0
        chosen = [self.pattern.select(each.detach(), self.keep) for each in logits]
        return torch.stack(chosen)

    @torch.no_grad()
    def typical(self) -> Tensor:
        """The bool mask of the mean M of the training."""
        return self.hard(self.logits(self.block.generator.mean[None]))[0]

    def masks(self, m: Tensor) -> Tensor:
        """Masks of all samples: 0 and 1, differentiable in training."""
        logits = self.logits(m)
        if not self.training:
            self.last = self.hard(logits)
            return self.last
        self.draws += 1
        stream = generator_for(self.seed, self.name, int(self.draws))
        noisy = logits + gumbel(logits.shape, stream).to(logits.device)
        return straight_through(self.hard(noisy), noisy, self.tau)

    def forward(self, input: Tensor) -> Tensor:
        m = self.block.now
        if m is None or len(m) != len(input):
            raise ModelError(
                f"{self.name}: its inputs {list(input.shape)} are not one a sample of its block"
            )
        weight = self.weight * self.masks(m).to(self.weight.dtype)
        out = torch.bmm(input.flatten(1, -2) if input.ndim > 2 else input[:, None], weight.mT)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*input.shape[:-1], self.out_features)

    def plain(self) -> nn.Linear:
        """The ordinary layer with the same parameters."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight, made.bias = self.weight, self.bias
        return made.train(self.training)
