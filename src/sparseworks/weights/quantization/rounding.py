"""Round-to-nearest in groups, the baseline of quantization methods (Jacob et al. 2018, Quantization
and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference; groups of columns
as in Shen et al. 2020, Q-BERT).

    s = (max - min) / (2^b - 1),   z = round(-min / s),   W_q = s (clamp(round(W / s) + z) - z)

for each group of consecutive columns, with 0 between min and max; without zero points s is that of
the largest |W|, or some that is smaller where the squared error is less. Masked weights stay 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.weights.quantization.method import Quantization, Work

__all__ = ["Rounding", "check_bits"]


def check_bits(name: str, bits: int, group: int | None) -> None:
    """Refuse what no grid has.

    Raises:
        InvalidArgument: bits beyond 2 to 8, or a group without columns.
    """
    if not (isinstance(bits, int) and 2 <= bits <= 8) or (group is not None and group < 1):
        raise InvalidArgument(f"{name}: bits={bits} from 2 to 8, group={group} at least 1")


@dataclass(frozen=True, kw_only=True)
class Rounding(Quantization):
    """Round every weight to the nearest integer of its group.

    Args:
        bits: of a code.
        group: columns that share a scale; None: a whole row.
        zeros: a zero point for each group; without, codes are symmetric.
    """

    bits: int = 4
    group: int | None = 32
    zeros: bool = True

    info: ClassVar[MethodInfo] = MethodInfo(
        name="rounding",
        title="Round-to-nearest in groups",
        authors="Jacob et al.",
        year=2018,
        room="weights",
        kind="quantization",
        pattern="that of the model's masks",
        cost="no data",
        summary="round weights to integers with a scale for each group",
    )

    def __post_init__(self) -> None:
        check_bits("rounding", self.bits, self.group)

    def run(self, work: Work) -> None:
        views = work.fitting(self.group)
        for i, view in enumerate(views):
            work.put(view, work.rounded(view, self.bits, self.group, self.zeros))
            work.tell(i + 1, len(views), view.name)
