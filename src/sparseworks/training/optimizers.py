"""The optimizers of a sparse run: what each holds and keeps, and when a step of the run is over.

A model may be trained by several: matrices by one and the rest by another, or two halves in turn.
A step of the run is over when each one that holds a masked tensor has stepped at least once since
the last; two that step together count once, five critic steps and one of the generator too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparseworks.core.errors import InvalidArgument

__all__ = ["Optimizers"]

_FLATTENING = (
    "FP16_Optimizer", "DistributedFusedAdam", "DistributedFusedLAMB", "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer", "ZeroRedundancyOptimizer",
)  # fmt: skip
_WRAPPING = ("AcceleratedOptimizer", "LightningOptimizer")  # hooks go on the optimizer inside


class Optimizers:
    """One optimizer or several, out of their wrappers.

    Args:
        given: an optimizer, or a list of them.

    Attributes:
        all: in the order given.
        stepped: numbers of those that have stepped since the last step of the run was over.

    Raises:
        InvalidArgument: none, one of them twice, or one that steps copies of the weights.
    """

    def __init__(self, given: Any) -> None:
        several = given if isinstance(given, (list, tuple)) else [given]
        self.all = tuple(_inside(o) for o in several)
        different = len({id(o) for o in self.all})
        if not self.all or different < len(self.all):
            raise InvalidArgument(
                f"{len(self.all)} optimizers were given, {different} of them different: give every "
                "one that trains the model, each once"
            )
        self._holders: dict[str, set[int]] = {}  # masked tensor -> the numbers of its optimizers
        self._awaited: set[int] = set(range(len(self.all)))
        self.stepped: set[int] = set()

    @property
    def held(self) -> set[int]:
        """The ids of the parameters that they hold."""
        return {key for optimizer in self.all for key in _ids(optimizer)}

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Find out who holds which of the masked tensors."""
        ids = [set(_ids(o)) for o in self.all]
        self._holders = {
            name: {i for i, own in enumerate(ids) if id(p) in own} for name, p in parameters.items()
        }
        self._awaited = set().union(*self._holders.values()) or set(range(len(self.all)))

    def names_of(self, optimizer: Optimizer) -> list[str]:
        """The masked tensors that a step of this optimizer may have moved: its own and nobody's."""
        number = self._number(optimizer)
        return [n for n, holders in self._holders.items() if not holders or number in holders]

    def step_is_over(self, optimizer: Optimizer) -> bool:
        """Count a step of one of them; True where it was the last that the run waited for."""
        self.stepped.add(self._number(optimizer))
        over = self.stepped >= self._awaited
        if over:
            self.stepped.clear()
        return over

    def state_of(self, parameter: nn.Parameter) -> list[Tensor]:
        """What the optimizers keep for each element of a parameter (momenta)."""
        return [
            value
            for optimizer in self.all
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        ]

    def _number(self, optimizer: Optimizer) -> int:
        return next(i for i, o in enumerate(self.all) if o is optimizer)


def _ids(optimizer: Optimizer) -> Iterator[int]:
    return (id(p) for group in optimizer.param_groups for p in group["params"])


def _inside(optimizer: Any) -> Optimizer:
    """The optimizer that steps the parameters themselves."""
    if type(optimizer).__name__ in _WRAPPING:
        optimizer = optimizer.optimizer
    if type(optimizer).__name__ in _FLATTENING:
        raise InvalidArgument(
            f"{type(optimizer).__name__} keeps flattened copies of the weights, in which masks "
            "cannot be enforced; use an optimizer that steps the parameters themselves"
        )
    found: Optimizer = optimizer
    return found
