"""Matrices for decoding, in panels of 16 rows: what is multiplied with one vector at a time.

A panel holds 16 rows side by side, so that each lane of a vector register sums up its own row, and
is one stream of bytes (the layout of each format is in `native/decoder/matrix.h`):

| format | a weight | bytes of a weight |
| --- | --- | --- |
| `float` | fp32 | 4 |
| `half` | bf16 | 2 |
| `int8` | scale * code, a scale for 32 columns of a row | 1.0625 |
| `int4` | the same in 4 bits | 0.5625 |
| `masked-half` | a bit a weight, kept ones in bf16 | 0.125 + 2 density |
| `masked-int8` | a bit a weight, a scale for 128 columns | 0.141 + density |
| `masked-int4` | a bit a weight, a scale for 64 columns | 0.156 + 0.53 density at 50 % |
| `group-int4` | groups of 16 columns of a row, kept or not | 0.008 + 0.625 density |
| `listed-int8` | columns and codes in fours, a scale for 128 | 0.023 + 2.5 density at 10 % |
| `column-int8` | as `int8`, column by column, for inputs with zeros | 0.0625 + active inputs |
| `column-int4` | the same in 4 bits | 0.0625 + 0.5 active inputs |

N:M weights are `masked`: two of four take four bits either way. Scales are fp16. Vectors are read
as integers of 16 bits where weights are integers (a relative error of 2^-16 of the largest), as
fp32 otherwise; several vectors at once are rounded to bf16 where the processor multiplies that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.native import module

__all__ = ["ROW_OF_BYTE", "Format", "Packed", "Panels"]

_LINE = 64  # bytes that a processor reads at once
# of 64 rows of a column in `column-int8` and `column-int4`: the row of each byte
ROW_OF_BYTE = [b // 4 % 4 * 16 + b // 16 * 4 + b % 4 for b in range(64)]


class Format(IntEnum):
    """How the weights of a panel are written."""

    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT4 = 3
    MASKED_HALF = 4
    MASKED_INT8 = 5
    MASKED_INT4 = 6
    GROUP_INT4 = 7
    COLUMN_INT8 = 8
    COLUMN_INT4 = 9
    LISTED_INT8 = 10

    @property
    def text(self) -> str:
        return self.name.lower().replace("_", "-")

    @property
    def bits(self) -> int:
        """Of a code; 0 where values are floats."""
        return {"INT8": 8, "INT4": 4}.get(self.name.rpartition("_")[2], 0)

    @property
    def masked(self) -> bool:
        return self.name.startswith("MASKED")

    @property
    def by_columns(self) -> bool:
        """Whether columns are read one by one, those of inputs that are not 0."""
        return self.name.startswith("COLUMN")

    @property
    def group(self) -> int:
        """Columns that share a scale, or are kept together."""
        return {"MASKED_HALF": 128, "MASKED_INT8": 128, "MASKED_INT4": 64, "GROUP_INT4": 16,
                "LISTED_INT8": 128,
                "FLOAT": 16}.get(self.name, 32)  # fmt: skip

    @classmethod
    def parse(cls, text: str) -> Format:
        """By its name.

        Raises:
            InvalidArgument: no such format.
        """
        found = next((f for f in cls if f.text == text), None)
        if found is None:
            raise InvalidArgument(
                f"unknown format {text!r}; use one of {', '.join(f.text for f in cls)}"
            )
        return found


@dataclass(frozen=True)
class Panels:
    """A matrix `[rows, columns]` in panels.

    Args:
        format: of its weights.
        rows, columns: of the matrix.
        zeros: `group-int4` with a zero point for each group.
        data: uint8, the bytes of all panels and 64 more.
        offset: int64 `[panels + 1]`, where each panel begins, or each tile of 4,096 rows (8,192 in
            4 bits) where columns are gathered (whose bytes are moved to where lines of the caches
            begin).

    Raises:
        InvalidArgument: bytes that are not such panels (where native code could check them).
    """

    format: Format
    rows: int
    columns: int
    zeros: bool
    data: Tensor
    offset: Tensor
    native: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.format.by_columns and self.data.data_ptr() % _LINE:
            object.__setattr__(self, "data", self.data.clone())
        code = module()
        if code is None:
            return
        try:
            made = code.decoder.matrix(
                int(self.format), self.rows, self.columns, self.format.group, self.zeros,
                self.data, self.offset,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise InvalidArgument(f"not a matrix in panels: {error}") from None
        object.__setattr__(self, "native", made)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "native"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "native", None)
        self.__post_init__()

    @property
    def nbytes(self) -> int:
        return int(self.offset[-1])


@dataclass(frozen=True)
class Packed:
    """A matrix in panels, and what rounding changed.

    Attributes:
        error: sqrt(sum h (w - w')^2 / sum h w^2), with the importance h that was given.
        kept: weights that are not zero.
    """

    panels: Panels
    error: float
    kept: int
