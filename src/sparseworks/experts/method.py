"""The contract of methods that route: which router and experts a layer has, losses, schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.experts.banks import Experts
from sparseworks.experts.layers import MoE
from sparseworks.experts.losses import load_balance, z_loss
from sparseworks.experts.mlps import Mlp

__all__ = ["Job", "Layers", "MixtureMethod", "chosen_layers"]

Layers = Literal["all", "alternate", "first-half", "second-half"]


class Job(Protocol):
    """A mixture in training, as far as a method sees it; `upcycle` makes it.

    Attributes:
        model: with its mixtures.
        layers: they, by name.
        step: optimizer steps taken.
        steps: of the whole training, where it is told.
        own: numbers that the method keeps between its calls.
    """

    model: nn.Module
    layers: dict[str, MoE]
    step: int
    steps: int | None
    own: dict[str, Any]

    @property
    def progress(self) -> float:
        """step / steps, at most 1."""

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """They do not train until `finish`."""


@dataclass(frozen=True)
class MixtureMethod(ABC):
    """What `upcycle` calls.

    Args:
        experts: N of every layer.
        start: what experts are at first: "copies" of the MLP, or "fresh" ones.
        balance: factor of the load-balance loss.
        z: factor of the loss on the size of logits.
    """

    experts: int = 8
    start: str = "copies"
    balance: float = 0.01
    z: float = 0.0

    info: ClassVar[MethodInfo]
    starts: ClassVar[tuple[str, ...]] = ("copies", "fresh")

    def __post_init__(self) -> None:
        if self.experts < 1 or self.balance < 0 or self.z < 0:
            raise InvalidArgument(
                f"experts={self.experts} from 1, balance={self.balance} and z={self.z} from 0"
            )
        if self.start not in self.starts:
            raise InvalidArgument(f"start={self.start!r}: use one of {', '.join(self.starts)}")

    @abstractmethod
    def layer(self, mlp: Mlp, generator: torch.Generator) -> MoE:
        """The mixture in place of an MLP; nothing is changed."""

    def taken(self, mlps: Sequence[Mlp]) -> list[Mlp]:
        """Those of the chosen MLPs that become mixtures."""
        return list(mlps)

    def bank(self, mlp: Mlp, generator: torch.Generator) -> Experts:
        """The experts of a layer, by `start`."""
        if self.start == "copies":
            return mlp.copies(self.experts, generator)
        return mlp.fresh(self.experts, mlp.hidden, generator)

    def begin(self, job: Job) -> None:  # noqa: B027
        """Once, when all layers stand."""

    def penalty(self, job: Job) -> Tensor | None:
        """What the last forward pass adds to the loss: sum over layers of the usual two losses."""
        found: list[Tensor] = []
        for layer in job.layers.values():
            if layer.routing is None:
                continue
            if self.balance:
                found.append(self.balance * load_balance(layer.routing))
            if self.z:
                found.append(self.z * z_loss(layer.routing))
        return torch.stack(found).sum() if found else None

    def update(self, job: Job) -> None:  # noqa: B027
        """After each optimizer step."""

    def restore(self, job: Job) -> None:  # noqa: B027
        """After `job.step` and `job.own` were read back."""

    def finish(self, job: Job) -> None:  # noqa: B027
        """At the end of training."""

    def undo(self, job: Job) -> None:  # noqa: B027
        """Take away what `begin` put outside the layers; they are about to go."""


def chosen_layers(mlps: Sequence[Mlp], layers: Layers) -> list[Mlp]:
    """All, every second from the first, or one half of them."""
    if layers == "all":
        return list(mlps)
    if layers == "alternate":
        return list(mlps[::2])
    half = len(mlps) // 2
    return list(mlps[:half] if layers == "first-half" else mlps[half:])
