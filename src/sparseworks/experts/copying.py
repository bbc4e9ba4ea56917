"""Sparse upcycling (Komatsuzaki et al. 2023, Sparse Upcycling: Training Mixture-of-Experts from
Dense Checkpoints): every MLP becomes N copies of itself under a new router,

    y = sum over the top k of p_i / (sum of the k) E_i(x),   p = softmax(W x).

The weights of the k add up to 1 and the copies are equal, so the function is the dense one at the
start whatever W is; W is small and random, which lets the copies part in training. Without
renormalisation the start is another function, which costs the trained model some of what it knew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.experts.banks import Experts
from sparseworks.experts.layers import MoE
from sparseworks.experts.method import Layers, MixtureMethod, chosen_layers
from sparseworks.experts.mlps import Mlp
from sparseworks.experts.routers import TopK

__all__ = ["Upcycling"]


@dataclass(frozen=True)
class Upcycling(MixtureMethod):
    """Copies of the MLP under a top-k router, as Mixtral has it.

    Args:
        top_k: experts of a token.
        renormalize: the k weights add up to 1; off, they stay probabilities, as top_k=1 needs for a
            gradient of the router (Switch), and the start is another function.
        noise: on the matrices of the copies, in deviations of each; 0 keeps the function.
        capacity: factor of the even load at which experts turn tokens away in training; None: none
            is dropped, and never in evaluation.
        layers: which MLPs: "all", "alternate", "first-half" or "second-half".
    """

    top_k: int = 2
    renormalize: bool = True
    noise: float = 0.0
    capacity: float | None = None
    layers: Layers = "all"

    info: ClassVar[MethodInfo] = MethodInfo(
        name="upcycling",
        title="Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
        authors="Komatsuzaki et al.",
        year=2023,
        room="experts",
        kind="mixture",
        pattern="experts of a token",
        budget="top-k of each token",
        tensors="MLPs",
        cost="no data",
        summary="copies of each MLP under a top-k router: the same function at the start",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.experts:
            raise InvalidArgument(f"top_k={self.top_k} must be in 1..experts={self.experts}")
        if self.noise < 0 or (self.capacity is not None and not self.capacity > 0):
            raise InvalidArgument("noise= from 0, capacity= above 0 or None")
        if self.top_k == 1 and self.renormalize and self.start == "fresh" and not self.balance:
            raise InvalidArgument(
                "top_k=1 with renormalize gives the router no gradient; set renormalize=False"
            )
        if self.layers not in ("all", "alternate", "first-half", "second-half"):
            raise InvalidArgument(
                f"layers={self.layers!r}: use all, alternate, first-half or second-half"
            )

    def taken(self, mlps: Sequence[Mlp]) -> list[Mlp]:
        return chosen_layers(mlps, self.layers)

    def bank(self, mlp: Mlp, generator: torch.Generator) -> Experts:
        if self.start == "copies":
            return mlp.copies(self.experts, generator, self.noise)
        return super().bank(mlp, generator)

    def layer(self, mlp: Mlp, generator: torch.Generator) -> MoE:
        down = mlp.weights[1]
        router = TopK(
            self.experts, mlp.width, self.top_k, renormalize=self.renormalize,
            generator=generator, dtype=down.dtype, device=down.device,
        )  # fmt: skip
        return MoE(router, self.bank(mlp, generator), capacity=self.capacity,
                   renormalize=self.renormalize)  # fmt: skip
