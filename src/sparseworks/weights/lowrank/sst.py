"""SST (Zhao et al. 2024, Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural
Networks, arXiv:2405.15481).

Every linear weight is kept as U diag(s) V^T, from the SVD of its start, so nothing changes at
first. Every `every` steps r of its k = min(out, in) components are drawn without replacement,

    p_i = (1/k + s_i / sum s) / 2,

half to explore, half by significance. Of U and V only the drawn vectors train, of s all values:

    s   <- max(s - step, 0)
    U_i <- unit(U_i - step of G V_i),   V_i <- unit(V_i - step of G^T U_i),    G = dL/dW.

The gradients are *enhanced*: the chain rule would multiply both by s_i and starve small components.
G is never formed. Drawn vectors start with fresh optimizer state. A round is ceil(k / r) draws, in
which each vector is expected about once; after it the SVD of U diag(s) V^T makes the vectors
orthogonal again. At the end the smallest components go.

Gradients and optimizer states are those of r (out + in) + k numbers; U and V themselves take up to
twice the dense weight, which Adam's two states and the gradient outweigh.

A hyperbolic layer trains so without a word: the linear map inside `sparseworks.zoo.LorentzLinear`
is a linear layer like others.

The length of a round, the fresh state and p are as we know the paper, not from code; `every` is
ours. With Adam the missing factor s_i hardly matters, since its steps do not depend on the size of
gradients; with SGD it does.

In our quick setting (claim 076: 120 steps of a Llama of width 96) LoRA and ReLoRA of equal rank
reach a lower loss; in a hyperbolic classifier SST is about 10 points more accurate than LoRA, and
training takes 46 % less memory than dense training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.models.views import View
from sparseworks.training.transforming import Transformed
from sparseworks.weights.lowrank.factoring import Factoring, factored, rank_of
from sparseworks.weights.lowrank.spectral import SpectralLinear

__all__ = ["SST", "draw", "kept_components"]


@dataclass(frozen=True, kw_only=True)
class SST(Factoring):
    """Train sampled singular vectors and all singular values of linear layers.

    `sparsity`, where the call gives one, is the fraction of components that `finish` drops.

    Args:
        rank: r; below 1: a share of the smaller side.
        every: steps between draws; None: a twentieth of the training, at most 100.
        enhanced: gradients of the vectors without the factor s_i.
        sampling: "half", as above, or "uniform".
        mass: without `sparsity`: `finish` keeps the largest components whose s make up this much of
            the sum.
        after: "parts": two linear layers, in which the rows and columns of dropped components are
            masked; "thin": the kept ones alone (one dense layer where that is smaller); "merged",
            one dense layer; "factored", the layers as they trained, with all components.
    """

    rank: float = 0.085
    every: int | None = None
    enhanced: bool = True
    sampling: Literal["half", "uniform"] = "half"
    mass: float = 0.9
    after: str = "parts"

    info: ClassVar[MethodInfo] = MethodInfo(
        name="sst",
        title="Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks",
        authors="Zhao et al.",
        year=2024,
        card="076",
        room="weights",
        kind="transform",
        needs=("training",),
        command="sparseworks train MODEL --data DATA --method sst --sparsity 0.5 --optimizer "
        "adamw --out OUT",
        pattern="singular components",
        budget="uniform",
        tensors="linear layers",
        cost="an SVD per weight and round; gradients and states of r (out + in) + k numbers",
        summary="train sampled singular vectors, prune small components at the end",
    )
    choices: ClassVar[tuple[str, ...]] = ("parts", "thin", "merged", "factored")

    def __post_init__(self) -> None:
        super().__post_init__()
        every = 1 if self.every is None else self.every
        if not self.rank > 0 or every < 1 or not 0 < self.mass <= 1:
            raise InvalidArgument(
                f"sst: rank={self.rank} must be positive, every={self.every} at least 1, "
                f"mass={self.mass} in (0, 1]"
            )
        if self.sampling not in ("half", "uniform"):
            raise InvalidArgument(f"sst: sampling={self.sampling!r}; use 'half' or 'uniform'")

    def layer(self, job: Transformed, view: View) -> SpectralLinear:
        rank = rank_of(self.rank, view.shape)
        if rank > min(view.shape):
            raise InvalidArgument(f"sst: rank={rank} is above {min(view.shape)} of {view.name}")
        bias = view.module.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        made = SpectralLinear(view.parameter.detach(), bias, rank, self.enhanced)
        self._draw(job, view.module_name, made)
        return made

    def update(self, job: Transformed) -> None:
        every = self.every or max(1, min(100, (job.steps or 2000) // 20))
        for name, layer in spectral(job):
            layer.take()
            if job.step % every:
                continue
            draws, rank = job.step // every, layer.left.shape[1]
            if draws % math.ceil(len(layer.values) / rank) == 0:
                layer.decompose()
                self._forget(job, layer.values)
            self._draw(job, name, layer)
            self._forget(job, layer.left, layer.right)

    def finish(self, job: Transformed) -> None:
        if self.after == "factored":
            return
        for name, layer in spectral(job):
            layer.decompose()
            count = len(layer.values)
            if job.sparsity is None:
                layer.kept = kept_components(layer.values.detach(), self.mass)
            else:
                layer.kept = max(1, count - int(job.sparsity * count + 1e-6))
            if self.after == "thin":
                job.replace(name, layer.thin().train(layer.training))
        super().finish(job)

    def _draw(self, job: Transformed, name: str, layer: SpectralLinear) -> None:
        generator = generator_for(job.seed, f"{name}.weight", job.step)
        rank, half = layer.left.shape[1], self.sampling == "half"
        layer.choose(draw(layer.values.detach(), rank, generator, half))

    @staticmethod
    def _forget(job: Transformed, *parameters: Any) -> None:
        for parameter in parameters if job.optimizer is not None else ():
            job.optimizer.state.pop(parameter, None)  # type: ignore[union-attr]


def spectral(job: Transformed) -> list[tuple[str, SpectralLinear]]:
    """The layers of a job."""
    return [(n, layer) for n, layer in factored(job.model) if isinstance(layer, SpectralLinear)]


def draw(s: Tensor, rank: int, generator: torch.Generator, half: bool = True) -> Tensor:
    """`rank` components without replacement, rising; p_i = (1/k + s_i / sum s) / 2, or 1/k."""
    flat = torch.full_like(s, 1 / len(s), dtype=torch.float64, device="cpu")
    weight = s.double().cpu()
    if half and float(weight.sum()) > 0:
        flat = (flat + weight / weight.sum()) / 2
    return torch.multinomial(flat, rank, generator=generator).sort().values


def kept_components(s: Tensor, mass: float) -> int:
    """The fewest of the falling s whose sum reaches `mass` of all; at least one."""
    part = s.double().cumsum(0)
    return max(1, int((part < mass * part[-1] * (1 - 1e-12)).sum()) + 1)
