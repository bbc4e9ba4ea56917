"""Importance of a group: what its slices weigh, or what the loss would say without them.

Every score is a sum over all slices of a group g of an elementwise importance, `score[g]` =
(sum over slices of sum of e(w))^p, as the paper of each says. Structured methods are these scores;
`slim` cuts the groups that score least.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sparseworks.core.errors import DataError, InvalidArgument, ModelError
from sparseworks.core.registry import MethodInfo, Need
from sparseworks.models.calls import Batch, Loss, default_loss
from sparseworks.models.coupling import Coupling
from sparseworks.models.modes import evaluating
from sparseworks.weights.structured.base import GroupScore, Scores
from sparseworks.weights.structured.inputs import input_moments

__all__ = ["ActivationEnergy", "BatchNormScale", "Fisher", "GroupNorm", "RandomGroups", "Taylor"]


def gather(coupling: Coupling, importance: Mapping[str, Tensor]) -> Scores:
    """Sum elementwise importances over the slices of every group, `[groups]`."""
    scores = np.zeros(coupling.count)
    for (name, axis), labels in coupling.axes.items():
        if name in importance:
            value = importance[name].detach().double()
            others = [d for d in range(value.ndim) if d != axis]
            sums = (value.sum(others) if others else value).cpu().numpy()
            np.add.at(scores, labels, sums)
    return scores


def _info(
    name: str, title: str, authors: str, year: int, summary: str,
    needs: tuple[Need, ...] = (), cost: str = "none",
) -> MethodInfo:  # fmt: skip
    return MethodInfo(
        name, title, authors, year, "weights/structured", "structured", needs=needs, cost=cost,
        pattern="coupled groups", budget="flops, params or latency", summary=summary,
    )  # fmt: skip


def _batches(data: Iterable[Batch] | None, name: str) -> list[Batch]:
    batches = list(data) if data is not None else []
    if not batches:
        raise DataError(f"{name} scores groups by gradients or activations: give data=")
    return batches


@dataclass(frozen=True)
class GroupNorm(GroupScore):
    """||W_g||_2 over all coupled weights of a group, over the mean of its family.

    Source: Li et al. 2017, Pruning Filters for Efficient ConvNets (norms of filters), summed over
    the group as in Fang et al. 2023, DepGraph: Towards Any Structural Pruning.

    Args:
        p: of the norm.
        root: False ranks by ||W_g||_p^p, which spreads more within a family: layers are cut more
            evenly.
    """

    p: float = 2.0
    root: bool = True

    info: ClassVar[MethodInfo] = _info(
        "group-norm",
        "Pruning Filters for Efficient ConvNets; DepGraph: Towards Any Structural Pruning",
        "Li et al.; Fang et al.",
        2023,
        "cut the coupled groups with the smallest norm",
    )

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        weights = {n: w.detach() for n, w in model.named_parameters() if w.ndim >= 2}
        scores = gather(coupling, {n: w.abs().pow(self.p) for n, w in weights.items()})
        return scores ** (1 / self.p) if self.root else scores


@dataclass(frozen=True)
class RandomGroups(GroupScore):
    """score[g] = u, uniform on [0, 1): the baseline every criterion must beat.

    Source: no paper's; a control of every comparison.
    """

    seed: int = 0

    info: ClassVar[MethodInfo] = _info(
        "group-random", "Random channel pruning (baseline)", "-", 2017, "cut groups at random"
    )

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        return np.random.default_rng(self.seed).random(coupling.count)


@dataclass(frozen=True)
class BatchNormScale(GroupScore):
    """sum |gamma| over the batch-norm scales of a group, over the mean of its family.

    Source: Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming.
    """

    info: ClassVar[MethodInfo] = _info(
        "group-bn",
        "Learning Efficient Convolutional Networks through Network Slimming",
        "Liu et al.",
        2017,
        "cut the channels with the smallest batch-norm scales",
    )

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        scales = {
            f"{n}.weight" if n else "weight": m.weight.detach().abs()
            for n, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine
        }
        if not scales:
            raise ModelError(f"{type(model).__name__} has no batch norm with scales to rank by")
        return gather(coupling, scales)


class _Gradients(GroupScore):
    """Mean over batches of a function of the weights of a group and their gradients."""

    normalise: ClassVar[bool | None] = False

    @abstractmethod
    def of_batch(self, coupling: Coupling, product: Mapping[str, Tensor]) -> Scores:
        """Scores from w g of one batch, by parameter name."""

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        batches = _batches(data, type(self).__name__)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise InvalidArgument("every parameter is frozen, so there are no gradients to score")
        total = np.zeros(coupling.count)
        with evaluating(model):
            for batch in batches:
                value = (loss or default_loss)(model, batch)
                grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
                found = zip(named.items(), grads)
                total += self.of_batch(
                    coupling, {n: w.detach() * g for (n, w), g in found if g is not None}
                )
        return total / len(batches)


@dataclass(frozen=True)
class Taylor(_Gradients):
    """mean over batches of (sum over the group's slices of g w)^2: the loss without the group.

    Source: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning.
    """

    info: ClassVar[MethodInfo] = _info(
        "group-taylor",
        "Importance Estimation for Neural Network Pruning",
        "Molchanov et al.",
        2019,
        "cut the groups whose removal changes the loss least, to first order",
        ("data", "loss"),
        "one forward and backward pass over the data",
    )

    def of_batch(self, coupling: Coupling, product: Mapping[str, Tensor]) -> Scores:
        scores: Scores = gather(coupling, product) ** 2
        return scores


@dataclass(frozen=True)
class Fisher(_Gradients):
    """mean over batches of sum g^2 w^2: the diagonal of the (empirical Fisher) Hessian.

    Source: Theis et al. 2018, Faster gaze prediction with dense networks and Fisher pruning;
    LeCun et al. 1990, Optimal Brain Damage.
    """

    info: ClassVar[MethodInfo] = _info(
        "group-fisher",
        "Faster gaze prediction with dense networks and Fisher pruning",
        "Theis et al.",
        2018,
        "cut the groups with the smallest diagonal second-order term",
        ("data", "loss"),
        "one forward and backward pass over the data",
    )

    def of_batch(self, coupling: Coupling, product: Mapping[str, Tensor]) -> Scores:
        return gather(coupling, {n: x.square() for n, x in product.items()})


@dataclass(frozen=True)
class ActivationEnergy(GroupScore):
    """sum over consumers of E[x_c^2] ||W[:, c]||^2: the energy a channel sends on.

    Source: Hu et al. 2016, Network Trimming (activations); the weighting is that of Wanda (Sun et
    al. 2024) over whole columns.
    """

    info: ClassVar[MethodInfo] = _info(
        "group-energy",
        "Network Trimming: A Data-Driven Neuron Pruning Approach",
        "Hu et al.",
        2016,
        "cut the channels that send the least energy to the next layers",
        ("data",),
        "one forward pass over the data",
    )

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        weights = dict(model.named_parameters())
        scores = np.zeros(coupling.count)
        for name, (_, square) in input_moments(model, _batches(data, type(self).__name__)).items():
            weight = weights[name].detach().double()
            columns = weight.square().sum([d for d in range(weight.ndim) if d != 1])
            if (labels := coupling.axes.get((name, 1))) is not None:
                np.add.at(scores, labels, (square * columns).cpu().numpy())
        return scores
