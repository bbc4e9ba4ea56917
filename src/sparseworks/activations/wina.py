"""WINA (Chen et al. 2025, Weight Informed Neuron Activation for Accelerating Large Language Model
Inference, arXiv:2505.19427).

s_i = |x_i| ||W_:,i||_2; the K = floor(n (1 - s)) largest of a token are kept, y = W (x * m). For
orthogonal columns ||W (x - x * m)||^2 is the sum of the dropped x_i^2 ||W_:,i||^2, so the choice is
the best there is. `rotate` meets the assumption: the inputs of attention are turned by the right
singular vectors of W_k, those of the MLP by those of W_gate.

The paper folds the gains of norms into the matrices, turns the residual stream and every matrix
that reads or writes it, and so has to turn the stream twice a layer. Here inputs, gains included,
are turned where they are read: the same two products of d x d, and weights, embeddings and norms
stay as they are (the released transform also subtracts the mean of each embedding, which changes
a model with RMSNorm). As in the released code, with `rotate` column norms weigh only the layer
whose columns became orthogonal; the others, and o and down, go by |x|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sparseworks.activations.calibrating import Reader
from sparseworks.activations.method import ByInputs, column_norms
from sparseworks.core.registry import MethodInfo

__all__ = ["WINA"]


@dataclass(frozen=True)
class WINA(ByInputs):
    """Score |x_i| ||W_:,i||."""

    select: Literal["threshold", "top-k"] = "top-k"

    info: ClassVar[MethodInfo] = MethodInfo(
        name="wina",
        title="WINA: Weight Informed Neuron Activation for Accelerating Large Language Model "
        "Inference",
        authors="Chen et al.",
        year=2025,
        card="126",
        room="activations",
        kind="activation",
        needs=("data",),
        pattern="inputs of a token",
        tensors="inputs of linear layers",
        cost="one pass over the calibration data",
        summary="inputs of smallest |x| times the norm of their column count as 0",
    )

    def weight(self, reader: Reader) -> Tensor | None:
        return column_norms(reader.weight)
