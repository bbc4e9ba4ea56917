"""R-Sparse (Zhang et al. 2025, R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM
Inference, ICLR 2025, arXiv:2504.19449).

Few inputs of a linear layer meet its columns, all others pass through an approximation of rank r:

    M_i = 1[|x_i| ||W_:,i|| > tau],  y = W (x * M) + U_r S_r V_r^T (x * (1 - M)) + b

W = U S V^T is m x n; of the mn (1 - s) weights that a token may touch, a share `alpha` goes to k =
floor(n (1 - s) alpha) columns, the rest to the rank r = floor((mn (1 - s) - k m) / (m + n)), at
least 1 where anything is left. tau is a quantile of the scores of all calibration tokens, so that
k is met on average. alpha = 1 has no second part; 0 has nothing else.

The paper searches one alpha for each layer by evolution, with the perplexity of calibration text
as fitness and settings that are not published; `alpha=None` takes for each layer, of a grid, the
one that leaves the least output error on the calibration inputs. Released code takes the matrices
of keys and values for square in its budget, which they are not with grouped queries, and drops the
column norms at alpha = 1; neither is done here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseworks.activations.calibrating import Family, Reader, quantile
from sparseworks.activations.method import InputMethod, column_norms
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.models.active import ActiveInputs, Gate, InputGate, RuledGate

__all__ = ["LowRankGate", "RSparse"]

_GRID = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


class LowRankGate(RuledGate):
    """Inputs that do not count pass through `up` (`down` x) beside the layer.

    Args:
        rule: which inputs count.
        down: V_r^T `[r, in]`.
        up: U_r S_r `[out, r]`.
    """

    def __init__(self, rule: ActiveInputs, down: Tensor, up: Tensor) -> None:
        super().__init__(rule)
        self.down, self.up = down, up
        self._dropped: list[Tensor] = []

    @property
    def extra(self) -> int:
        """Weights of the second part."""
        return self.down.numel() + self.up.numel()

    def attach(self, module: nn.Module) -> list[Any]:
        return [*super().attach(module), module.register_forward_hook(self.add)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        mask = self.rule.mask(args[0])
        self.count(mask)
        self._dropped.append(args[0] * ~mask)
        return (args[0] * mask, *args[1:])

    def add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = self._dropped.pop()
        return output + x @ self.down.to(x).T @ self.up.to(x).T


@dataclass(frozen=True)
class RSparse(InputMethod):
    """Column-sparse plus low-rank.

    Args:
        alpha: share of the weights that goes to whole columns; None: searched for each layer.
    """

    alpha: float | None = None

    info: ClassVar[MethodInfo] = MethodInfo(
        name="r-sparse",
        title="R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference",
        authors="Zhang et al.",
        year=2025,
        card="078",
        room="activations",
        kind="activation",
        needs=("data",),
        pattern="inputs of a token",
        tensors="inputs of linear layers",
        cost="one pass over the calibration data, an SVD of every matrix",
        summary="large inputs meet their columns, the others a low-rank matrix",
    )

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InvalidArgument(f"alpha={self.alpha} is not in [0, 1]")

    def family(self, reader: Reader) -> Family:
        u, s, v = torch.linalg.svd(reader.weight.double(), full_matrices=False)
        up, down = (u * s).float(), v.float()
        norms = column_norms(reader.weight)
        score = ActiveInputs(weight=norms).score(reader.inputs)

        def gate(sparsity: float, alpha: float) -> Gate:
            rows, columns = reader.weight.shape
            share = (1 - sparsity) * alpha
            budget = rows * columns * (1 - sparsity)
            k = int(columns * share + 1e-9)
            rank = int((budget - k * rows) / (rows + columns) + 1e-9)
            threshold = quantile(score, 1 - share)
            rule = ActiveInputs(threshold=threshold, weight=norms, share=max(share, 1e-9))
            if alpha == 1:
                return InputGate(rule)
            rank = min(max(rank, 1), down.shape[0])
            return LowRankGate(rule, down[:rank].contiguous(), up[:, :rank].contiguous())

        def best(sparsity: float) -> Gate:
            if self.alpha is not None:
                return gate(sparsity, self.alpha)
            tried = [gate(sparsity, a) for a in _GRID]
            return min(tried, key=lambda g: _lost(g, reader))

        return best


def output_error(gate: Gate, reader: Reader) -> float:
    """||y - y'||^2 / ||y||^2 over the calibration inputs, without biases."""
    return _lost(gate, reader) / float((reader.inputs @ reader.weight.T).square().sum())


def _lost(gate: Gate, reader: Reader) -> float:
    """||y - y'||^2, which is enough to compare gates of one layer."""
    assert isinstance(gate, RuledGate)
    dropped = reader.inputs * ~gate.rule.mask(reader.inputs)
    lost = dropped @ reader.weight.T
    if isinstance(gate, LowRankGate):
        lost = lost - dropped @ gate.down.T @ gate.up.T
    return float(lost.square().sum())
