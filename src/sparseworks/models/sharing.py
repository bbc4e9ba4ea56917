"""Weights that are multiplied by the very same inputs: their sums are gathered once.

Query, key and value of a block read one tensor, gate and up another. Which weights do is seen in
the products themselves, never told by names: a weight follows another one if every product that it
took part in came right after the other's, group for group, with the same tensor.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["Sharing"]


class Sharing:
    """Follows the products of some weights, in their order.

    Attributes:
        leaders: weight -> the one whose sums are its own too.
        broken: a weight that followed another one saw something else later. What was gathered up
            to there cannot be told apart: gather again, without sharing.
    """

    def __init__(self) -> None:
        self.leaders: dict[str, str] = {}
        self.broken = False
        self._products: dict[str, int] = {}
        self._inputs: Tensor | None = None
        self._like: object = None
        self._first = ""  # the weight that the inputs were told of first

    def covers(self, name: str, inputs: Tensor, like: object) -> bool:
        """Does another weight gather these inputs for this one?

        Args:
            name: of the weight, whose product this is.
            inputs: the same object where the product before had the same.
            like: what else must be equal for sums to be the same.
        """
        count = self._products[name] = self._products.get(name, 0) + 1
        if inputs is self._inputs and like == self._like and name != self._first:
            follows = count == 1 or self.leaders.get(name) == self._first
            if follows and count == self._products[self._first]:
                self.leaders[name] = self._first
                return True
        self._inputs, self._like, self._first = inputs, like, name
        self.broken |= name in self.leaders
        return False

    def end_of_batch(self) -> None:
        """No product of this batch is left: all that follow must have seen what they follow."""
        self._inputs = None
        self.broken |= any(
            self._products[name] != self._products[leader] for name, leader in self.leaders.items()
        )
