"""CHESS (He et al. 2024, CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and
Selective Sparsification, EMNLP 2024, arXiv:2409.01366), and CATS (Lee et al. 2024,
arXiv:2404.08763).

A gated MLP computes g = act(W_g x), u = W_u x, y = W_d (g * u). Dropping channel i costs about
|g_i u_i| (columns of W_d taken as equally long). u_i is not known before it is computed, so its
mean over calibration tokens stands for it:

    ubar_i = E|u_i|,  T = the s-quantile of |g_i| ubar_i over channels and tokens,
    tau_i = T / ubar_i,  g_i <- 0 where |g_i| < tau_i

The decision needs g alone: row i of W_u and column i of W_d are touched by survivors only, W_g by
all. Inputs of the projections of queries and of attention's output below the s-quantile of their
own |x| count as 0 too; keys and values read all of theirs, as their errors would stay in the
cache. CATS: one s-quantile of |g| for a layer, and attention as it is.

Released code takes quantiles text by text and their mean; here one quantile is taken of all
calibration tokens. Where ubar is constant CHESS is CATS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseworks.activations.calibrating import Job, quantile
from sparseworks.activations.method import ActivationMethod, gated_mlps
from sparseworks.core.registry import MethodInfo
from sparseworks.models.active import ActiveInputs, Gate, InputGate

__all__ = ["CATS", "CHESS", "OutputGate"]

_LEAST = 1e-12  # ubar of a channel that is never used
_QUERIES = ("q_proj",)
_OUTPUTS = ("o_proj", "out_proj")


class OutputGate(Gate):
    """Sets outputs with |g_i| < tau_i to 0. `tau`: `[channels]`, or one number in it."""

    def __init__(self, tau: Tensor) -> None:
        super().__init__()
        self.tau = tau

    def attach(self, module: nn.Module) -> list[Any]:
        return [module.register_forward_hook(self)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        mask = output.detach().float().abs() >= self.tau.to(output.device)
        self.count(mask)
        return output * mask


def _sizes(job: Job, outputs: list[str], inputs: list[str]) -> dict[str, Tensor]:
    """|values| `[tokens, channels]` that modules give or read, of a job's tokens."""
    kept: dict[str, list[Tensor]] = {n: [] for n in (*outputs, *inputs)}

    def keep(name: str, value: Tensor) -> None:
        room = job.tokens - sum(t.shape[0] for t in kept[name])
        if room > 0:
            kept[name].append(value.detach().float().abs().flatten(0, -2)[:room])

    def given(name: str) -> Any:
        return lambda module, args, output: keep(name, output)

    def read(name: str) -> Any:
        return lambda module, args: keep(name, args[0])

    job.watch({n: read(n) for n in inputs}, {n: given(n) for n in outputs})
    return {n: torch.cat(parts) for n, parts in kept.items()}


@dataclass(frozen=True)
class CATS(ActivationMethod):
    """One threshold of |g| for each MLP."""

    info: ClassVar[MethodInfo] = MethodInfo(
        name="cats",
        title="CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
        authors="Lee et al.",
        year=2024,
        room="activations",
        kind="activation",
        needs=("data",),
        pattern="channels of a token",
        tensors="gates of MLPs",
        cost="one pass over the calibration data",
        summary="channels of an MLP below a quantile of |gate| count as 0",
    )

    def gates(self, job: Job) -> dict[str, Gate]:
        acts = [a for a, _ in gated_mlps(job.model)]
        sizes = _sizes(job, acts, [])
        return {a: OutputGate(torch.tensor([quantile(sizes[a], job.sparsity)])) for a in acts}


@dataclass(frozen=True)
class CHESS(ActivationMethod):
    """A threshold of |g| for each channel.

    Args:
        attention: also the inputs of query and output projections.
    """

    attention: bool = True

    info: ClassVar[MethodInfo] = MethodInfo(
        name="chess",
        title="CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective "
        "Sparsification",
        authors="He et al.",
        year=2024,
        card="134",
        room="activations",
        kind="activation",
        needs=("data",),
        pattern="channels of a token",
        tensors="gates of MLPs, inputs of query and output projections",
        cost="one pass over the calibration data",
        summary="a threshold of |gate| for each channel of an MLP, by what it multiplies",
    )

    def gates(self, job: Job) -> dict[str, Gate]:
        pairs = gated_mlps(job.model)
        read = [
            v.module_name for v in job.views
            if v.module_name.rpartition(".")[2] in (*_QUERIES, *_OUTPUTS)
        ] if self.attention else []  # fmt: skip
        sizes = _sizes(job, [n for pair in pairs for n in pair], read)
        found: dict[str, Gate] = {}
        for act, up in pairs:
            mean = sizes[up].mean(0).clamp_min(_LEAST)
            limit = quantile(sizes[act] * mean, job.sparsity)
            found[act] = OutputGate(limit / mean)
        for name in read:
            threshold = quantile(sizes[name], job.sparsity)
            share = float((sizes[name] > threshold).float().mean())
            found[name] = InputGate(ActiveInputs(threshold=threshold, share=share))
        return found
