"""MLPs of dense models, read and checked, and the banks that are made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.experts.banks import ACTIVATIONS, Experts
from sparseworks.experts.products import Weights, reference
from sparseworks.models.modes import evaluating

__all__ = ["Mlp", "find_mlps"]

_PLAIN = (("up_proj", "down_proj"), ("fc1", "fc2"), ("c_fc", "c_proj"), ("up", "down"),
          ("dense_h_to_4h", "dense_4h_to_h"))  # fmt: skip
_PROBES = 16


@dataclass(frozen=True, eq=False)
class Mlp:
    """down(act(gate(x)) * up(x)), or down(act(up(x))), as one module of a model.

    Args:
        name, module: where it is.
        weights: as a bank of one expert.
        gated: with gates, above the values in the first matrix.
        activation: a name of `ACTIVATIONS`.
    """

    name: str
    module: nn.Module
    weights: Weights
    gated: bool
    activation: str

    @property
    def width(self) -> int:
        return self.weights[1].shape[1]

    @property
    def hidden(self) -> int:
        return self.weights[1].shape[2]

    def fresh(self, count: int, hidden: int, generator: torch.Generator) -> Experts:
        """Experts of this form with first values of their own."""
        down = self.weights[1]
        return Experts(
            count, self.width, hidden, gated=self.gated, activation=self.activation,
            bias=self.weights[2] is not None, generator=generator, dtype=down.dtype,
            device=down.device,
        )  # fmt: skip

    def copies(self, count: int, generator: torch.Generator, noise: float = 0.0) -> Experts:
        """Experts that are this MLP.

        Args:
            noise: normal noise on every copy's matrices, in deviations of each matrix.
        """
        made = self.fresh(count, self.hidden, generator)
        with torch.no_grad():
            for bank, own in zip(made.weights, self.weights, strict=True):
                if bank is None or own is None:
                    continue
                bank.copy_(own.expand_as(bank))
                if noise and bank.ndim == 3:
                    shift = torch.randn(bank.shape, generator=generator)
                    bank.add_(noise * own.float().std() * shift.to(bank))
        return made

    def split(self, count: int, generator: torch.Generator) -> Experts:
        """Experts that each hold an equal part of this MLP's neurons; their sum is the MLP.

        Raises:
            ModelError: the neurons do not divide.
        """
        if self.hidden % count:
            raise ModelError(f"{self.name}: {self.hidden} neurons do not divide into {count} parts")
        made = self.fresh(count, self.hidden // count, generator)
        with torch.no_grad():
            for place, (bank, own) in enumerate(zip(made.weights, self.weights, strict=True)):
                if bank is None or own is None:
                    continue
                if place == 1:
                    bank.copy_(own[0].reshape(self.width, count, -1).transpose(0, 1))
                elif place == 3:
                    bank.copy_(own / count)
                else:
                    halves = own[0].chunk(2 if self.gated else 1)
                    parts = [h.view(count, -1, *h.shape[1:]) for h in halves]
                    bank.copy_(torch.cat(parts, dim=1))
        return made


def find_mlps(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> list[Mlp]:
    """The MLPs of a model, each checked to compute what its name says.

    Raises:
        ModelError: there is none, or one holds NaN or Inf.
        InvalidArgument: a name pattern matches none.
    """
    patterns = [_listed(include), _listed(exclude)]
    found = [m for name, module in model.named_modules() if (m := _read(name, module)) is not None]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no MLP that experts can be made of: a module with "
            "gate_proj, up_proj and down_proj, or with two linear layers and an activation"
        )
    for pattern in (*patterns[0], *patterns[1]):
        if not any(fnmatchcase(m.name, pattern) for m in found):
            raise InvalidArgument(
                f"name pattern {pattern!r} matches no MLP; they are named like {found[0].name}"
            )

    def taken(name: str) -> bool:
        wanted = not patterns[0] or any(fnmatchcase(name, p) for p in patterns[0])
        return wanted and not any(fnmatchcase(name, p) for p in patterns[1])

    return [m for m in found if taken(m.name)]


def _listed(given: str | Iterable[str] | None) -> list[str]:
    if given is None:
        return []
    return [given] if isinstance(given, str) else list(given)


def _read(name: str, module: nn.Module) -> Mlp | None:
    parts: Any = dict(module.named_children())
    if {"gate_proj", "up_proj", "down_proj"} <= parts.keys():
        first, last, gated = [parts["gate_proj"], parts["up_proj"]], parts["down_proj"], True
    else:
        pairs = [p for p in _PLAIN if set(p) <= parts.keys()]
        if not pairs:
            return None
        first, last, gated = [parts[pairs[0][0]]], parts[pairs[0][1]], False
    layers = [_linear(m) for m in (*first, last)]
    if None in layers:
        return None
    biases = [m[1] for m in layers if m is not None]
    if len({b is None for b in biases}) > 1:
        return None
    weights = [m[0] for m in layers if m is not None]
    bank: Weights = (
        torch.cat(weights[:-1])[None], weights[-1][None],
        None if biases[0] is None else torch.cat([b for b in biases[:-1] if b is not None])[None],
        None if biases[-1] is None else biases[-1][None],
    )  # fmt: skip
    if not all(bool(torch.isfinite(t).all()) for t in bank if t is not None):
        raise ModelError(f"{name} holds NaN or Inf; repair the weights first")
    activation = _activation(module, bank, gated)
    return None if activation is None else Mlp(name, module, bank, gated, activation)


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    weight: Any = getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.device.type == "meta":
        return None
    if isinstance(module, nn.Linear):
        return weight.detach(), None if bias is None else bias.detach()
    if type(module).__name__ == "Conv1D":
        return weight.detach().t(), bias.detach()
    return None


@torch.no_grad()
def _activation(module: nn.Module, bank: Weights, gated: bool) -> str | None:
    """The activation with which the module computes what its layers say; None: there is none."""
    width, down = bank[0].shape[2], bank[1]
    x = torch.randn(_PROBES, width, generator=torch.Generator().manual_seed(0)).to(down)
    try:
        with evaluating(module):
            wanted = module(x)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    if not isinstance(wanted, Tensor) or wanted.shape != x.shape:
        return None
    error = 1e-4 if down.dtype.itemsize >= 4 else 3e-2
    for name, act in ACTIVATIONS.items():
        found = reference(x, [len(x)], bank, act, gated)
        if float((found - wanted).norm()) <= error * float(wanted.norm()):
            return name
    return None
