"""Spark Transformer (You, Wu et al. 2025, Spark Transformer: Reactivating Sparsity in FFN and
Attention, NeurIPS 2025, arXiv:2506.06644): about k of d hidden units by a threshold, no sort.

    theta = mean(x) + std(x) Phi^-1(1 - k/d),   StatTopk(x) = max(x - theta, 0)

per token, std of the population, gradients through mean and std too. For normal x about k entries
are left; for others it may be more or fewer (k/d = 8 % becomes 6.8 % for Laplace entries). The
threshold stands before the activation function, whose value at 0 must be 0:

    y = W_d (act(StatTopk(W_g x)) * W_u x)

`Spark` puts it into the gated MLPs of a model, with the gate as wide as ever (the form of Gemma 3n
in transformers, where it is on in the first 10 layers at 95 %); train or fine-tune with it on. The
paper's own layers, whose gate reads half of the inputs, are in `spark_layers`. No training code was
published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseworks.activations.calibrating import Job
from sparseworks.activations.method import ActivationMethod, gated_mlps
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.registry import MethodInfo
from sparseworks.models.active import Gate

__all__ = ["Spark", "StatisticalGate", "statistical_threshold", "statistical_top_k"]


def statistical_threshold(x: Tensor, k: int, visible: Tensor | None = None) -> Tensor:
    """theta `[..., 1]`; -inf where there are no more than k entries.

    Args:
        x: `[..., d]`.
        visible: bool, broadcast to x: the entries that there are; None: all.
    """
    if k < 1:
        raise InvalidArgument(f"k={k} must be at least 1")
    if visible is None:
        count = torch.tensor(float(x.shape[-1]), dtype=torch.float64, device=x.device)
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    else:
        count = visible.sum(-1, keepdim=True).double()
        mean = (x * visible).sum(-1, keepdim=True) / count.to(x.dtype)
        variance = ((x - mean).square() * visible).sum(-1, keepdim=True) / count.to(x.dtype)
    few = count <= k
    quantile = torch.special.ndtri(torch.where(few, 0.5, 1 - k / count)).to(x.dtype)
    deviation = variance.clamp_min(torch.finfo(x.dtype).tiny).sqrt()  # a finite slope at 0
    theta: Tensor = mean + deviation * quantile
    return theta.masked_fill(few, -torch.inf)


def statistical_top_k(x: Tensor, k: int) -> Tensor:
    """max(x - theta, 0) over the last axis; x where it has no more than k entries."""
    if k >= x.shape[-1]:
        return x
    return (x - statistical_threshold(x, k)).relu()


class StatisticalGate(Gate):
    """StatTopk on what an activation function reads."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def attach(self, module: nn.Module) -> list[Any]:
        return [module.register_forward_pre_hook(self)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        y = statistical_top_k(args[0], self.k)
        self.count(y)
        return (y, *args[1:])


@dataclass(frozen=True)
class Spark(ActivationMethod):
    """Statistical top-k of the gates, k = d_ff (1 - sparsity)."""

    info: ClassVar[MethodInfo] = MethodInfo(
        name="spark",
        title="Spark Transformer: Reactivating Sparsity in FFN and Attention",
        authors="You et al.",
        year=2025,
        card="123",
        room="activations",
        kind="activation",
        needs=("data",),
        pattern="neurons of a token",
        tensors="gates of gated MLPs",
        cost="none before training; made for training from scratch",
        summary="gates below mean + z std of their token count as 0, the others are lowered by it",
    )

    def gates(self, job: Job) -> dict[str, Gate]:
        widths = {v.module_name: v.shape[0] for v in job.views}
        found: dict[str, Gate] = {}
        for act, up in gated_mlps(job.model):
            if up not in widths:
                continue
            if float(job.model.get_submodule(act)(torch.zeros(1))) != 0:
                raise ModelError(f"{act}: its value at 0 is not 0, so that no unit would be off")
            keep = max(1, round(widths[up] * (1 - job.sparsity)))
            found[act] = StatisticalGate(keep)
        if not found:
            raise ModelError("include= and exclude= leave no gated MLP; name their up_proj")
        return found
