"""Evidence: what calibration shows about the inputs of a matrix, in one streaming pass.

A collector belongs to one parameter. Its matrix may be several, one per group (experts, groups of
a convolution, packed projections): inputs arrive per group, results carry a leading group axis.
All sums are fp32 on the parameter's device.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from sparseworks.core.errors import DataError

_BAND = 1024  # columns of a Hessian that are summed at once

__all__ = ["Collector", "Hessian", "InputMoments", "InputNorm"]


class Collector(ABC):
    """Streams inputs `[tokens, in]` of each group; what it is depends on them alone, so that
    parameters which see the same inputs may share it.

    Args:
        groups: number of matrices that share the parameter.
        inputs: number of input features of each.
        device: where the sums live.

    Attributes:
        power: sum over all tokens of |W x|^2, fp32 `[groups]`, W being the parameter as it was;
            None unless `reads_power` and every product showed its outputs.
    """

    reads_power: ClassVar[bool] = False
    power: Tensor | None = None

    def __init__(self, groups: int, inputs: int, device: torch.device | str = "cpu") -> None:
        self.groups, self.inputs = groups, inputs
        self.device = torch.device(device)
        self.tokens = torch.zeros(groups, dtype=torch.int64)
        self.samples = 0

    def update(self, inputs: Tensor, group: int) -> None:
        """Add inputs `[tokens, in]` seen by one group."""
        if inputs.numel() == 0:
            return
        self.tokens[group] += inputs.shape[0]
        self.merge(self.part(inputs), group)

    def part(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """What must be known of inputs to add them: here the inputs themselves.

        Where another process keeps the sums, this is what it is sent.
        """
        return (inputs,)

    def merge(self, part: tuple[Tensor, ...], group: int) -> None:
        """Add a part to the sums of a group, whose tokens are counted already."""
        self._add(part[0].float(), group)

    @abstractmethod
    def _add(self, inputs: Tensor, group: int) -> None: ...

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The running sums, which must stay finite."""

    def twin(self) -> Self:
        """The same sums, not a copy of them, for a parameter that saw the same inputs."""
        return copy.copy(self)

    def check(self, name: str) -> None:
        """Raise when the evidence holds NaN or Inf.

        Raises:
            DataError: with the name of the tensor whose inputs were not finite.
        """
        for tensor in self.tensors():
            if not bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):
                raise DataError(
                    f"{name}: the calibration data gives NaN or Inf at the input of this tensor"
                )

    def unseen_groups(self) -> list[int]:
        """Groups (experts) that no token reached."""
        return [g for g in range(self.groups) if int(self.tokens[g]) == 0]


class InputNorm(Collector):
    """norm_j = sqrt(sum over samples and tokens of x_j^2 / samples), `[groups, in]`."""

    def __init__(self, groups: int, inputs: int, device: torch.device | str = "cpu") -> None:
        super().__init__(groups, inputs, device)
        self.squares = torch.zeros(groups, inputs, device=self.device)

    def part(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return (inputs.float().square().sum(0),)

    def merge(self, part: tuple[Tensor, ...], group: int) -> None:
        self.squares[group] += part[0]

    def _add(self, inputs: Tensor, group: int) -> None:
        self.merge(self.part(inputs), group)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.squares,)

    @property
    def norm(self) -> Tensor:
        return (self.squares / max(1, self.samples)).sqrt()


class InputMoments(Collector):
    """Mean and (population) variance of every input, `[groups, in]`, by Chan's update."""

    def __init__(self, groups: int, inputs: int, device: torch.device | str = "cpu") -> None:
        super().__init__(groups, inputs, device)
        self.mean = torch.zeros(groups, inputs, device=self.device)
        self._m2 = torch.zeros(groups, inputs, device=self.device)

    def _add(self, inputs: Tensor, group: int) -> None:
        new, total = inputs.shape[0], int(self.tokens[group])
        mean = inputs.mean(0)
        delta = mean - self.mean[group]
        self._m2[group] += (inputs - mean).square().sum(0) + delta.square() * (
            (total - new) * new / total
        )
        self.mean[group] += delta * (new / total)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.mean, self._m2)

    @property
    def variance(self) -> Tensor:
        return self._m2 / self.tokens.clamp_min(1)[:, None].to(self.device)

    @property
    def norm(self) -> Tensor:
        """That of `InputNorm`: sqrt(sum x_j^2 / samples)."""
        tokens = self.tokens[:, None].to(self.device)
        return ((self._m2 + tokens * self.mean.square()) / max(1, self.samples)).sqrt()


class Hessian(Collector):
    """H = (2 / samples) sum x x^T, `[groups, in, in]`: the Hessian of ||W x - W' x||^2.

    Attributes:
        gram: sum x x^T in bands of columns, each from its square on the diagonal down; 0 above.
        kept: what solvers derive from H, for the other parameters that share it; None where this
            parameter has it alone.
    """

    reads_power = True

    def __init__(self, groups: int, inputs: int, device: torch.device | str = "cpu") -> None:
        super().__init__(groups, inputs, device)
        self.kept: dict[object, object] | None = None
        self.gram = torch.zeros(groups, inputs, inputs, device=self.device)

    def _add(self, inputs: Tensor, group: int) -> None:
        gram = self.gram[group]
        for start in range(0, self.inputs, _BAND):  # what is above the diagonal follows from below
            end = min(start + _BAND, self.inputs)
            gram[start:, start:end].addmm_(inputs[:, start:].t(), inputs[:, start:end])

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.gram,)

    def twin(self) -> Self:
        if self.kept is None:
            self.kept = {}
        return super().twin()

    def hessian(self, group: int) -> Tensor:
        """H of one group, `[in, in]`, a new tensor."""
        hessian = self.gram[group] * (2.0 / max(1, self.samples))
        for start in range(0, self.inputs, _BAND):
            end = min(start + _BAND, self.inputs)
            hessian[start:end, end:] = hessian[end:, start:end].t()
        return hessian
