"""CETT (Luo et al. 2025, Sparsing Law: Towards Large Language Models with Greater Activation
Sparsity, ICML 2025, arXiv:2411.02335): neurons that hardly contribute, for any activation function.

A gated MLP adds up neurons n_j = a_j W_d[:, j], a = act(W_g x) * W_u x. With the cumulative error
of tail truncation

    CETT(t) = mean over tokens of || sum of n_j with ||n_j|| <= t || / || sum of all n_j ||

each layer takes the largest t of 65,536 even steps, up to the 0.99 quantile of ||n_j||, for which
CETT(t) <= c, one c for all layers: neuron j counts where |a_j| > t / ||W_d[:, j]||. c is given, or
is the one for which the wanted share of neurons is dropped on average over layers, or for which
perplexity on the calibration data grows by a given share (PPL-p%, p = 1 in the paper).

Neurons at the threshold are dropped, so that exact zeros never count (released code keeps them,
and with t = 0 takes the zeros of a ReLU for active).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseworks.activations.calibrating import Job, Reader
from sparseworks.activations.method import ActivationMethod, column_norms, mlp_ends
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.models.active import ActiveInputs, Gate, InputGate, attached
from sparseworks.models.calls import default_loss

__all__ = ["CETT", "Layer"]

_STEPS = 65_536
_TOP = 0.99


class Layer:
    """The MLP of one block on calibration tokens.

    Attributes:
        size: ||n_j|| `[tokens, neurons]`.
        norms: ||W_d[:, j]|| `[neurons]`.
    """

    def __init__(self, reader: Reader) -> None:
        self._inputs, self._weight = reader.inputs, reader.weight
        self.norms = column_norms(reader.weight)
        self.size = reader.inputs.abs() * self.norms
        self._whole = (reader.inputs @ reader.weight.T).norm(dim=1).clamp_min(1e-30)
        few = self.size.flatten()[:: max(1, self.size.numel() >> 22)]
        self._top = float(few.quantile(_TOP))
        self._known: dict[int, float] = {}

    def threshold(self, step: int) -> float:
        low = float(self.size.min())
        return low + (self._top - low) * step / (_STEPS - 1)

    def cett(self, t: float) -> float:
        """CETT(t)."""
        tail = (self._inputs * (self.size <= t)) @ self._weight.T
        return float((tail.norm(dim=1) / self._whole).mean())

    def largest(self, c: float) -> float:
        """The largest threshold with CETT <= c; below 0 where there is none."""
        low, high = -1, _STEPS  # holds at low, not at high
        while high - low > 1:
            step = (low + high) // 2
            if step not in self._known:
                self._known[step] = self.cett(self.threshold(step))
            if self._known[step] <= c:
                low = step
            else:
                high = step
        return self.threshold(low) if low >= 0 else -1.0

    def rule(self, c: float) -> ActiveInputs:
        t = self.largest(c)
        share = float((self.size > t).float().mean())
        return ActiveInputs(threshold=t, weight=self.norms, share=share)


@dataclass(frozen=True)
class CETT(ActivationMethod):
    """Neurons by what they add to the output of their MLP.

    Args:
        error: c; None: the one that meets the sparsity.
        perplexity: by which share it may grow on the calibration data, instead of a sparsity
            (0.01 is PPL-1%).
    """

    error: float | None = None
    perplexity: float | None = None

    info: ClassVar[MethodInfo] = MethodInfo(
        name="sparsing-law",
        title="Sparsing Law: Towards Large Language Models with Greater Activation Sparsity",
        authors="Luo et al.",
        year=2025,
        card="112",
        room="activations",
        kind="activation",
        needs=("data",),
        pattern="neurons of a token",
        tensors="inputs of the last matrices of MLPs",
        cost="one pass over the calibration data, and some per layer",
        summary="neurons that add least to the output of their MLP count as 0",
    )

    def __post_init__(self) -> None:
        if self.error is not None and self.perplexity is not None:
            raise InvalidArgument("error= or perplexity=, not both")

    def gates(self, job: Job) -> dict[str, Gate]:
        layers: dict[str, Layer] = {}

        def visit(reader: Reader) -> None:
            layers[reader.names[0]] = Layer(reader)

        down = [v.module_name for v in mlp_ends(job)]
        job.each(False, visit, lambda name: name in down)

        def made(c: float) -> dict[str, Gate]:
            return {n: InputGate(layer.rule(c)) for n, layer in layers.items()}

        def dropped(c: float) -> float:
            return 1 - sum(x.rule(c).share for x in layers.values()) / len(layers)

        if self.error is not None:
            return made(self.error)
        if self.perplexity is None:
            return made(_largest(lambda c: dropped(c) <= job.sparsity))
        dense = _loss(job, {})
        limit = dense + math.log1p(self.perplexity)
        return made(_largest(lambda c: _loss(job, made(c)) <= limit))


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest c in [0, 1] for which it holds, to 2^-12."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _loss(job: Job, gates: dict[str, Gate]) -> float:
    with attached((job.model.get_submodule(n), g) for n, g in gates.items()):
        losses: list[Tensor] = [default_loss(job.model, b) for b in job.batches]
    return float(torch.stack(losses).mean())
