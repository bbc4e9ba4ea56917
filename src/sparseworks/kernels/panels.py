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

N:M weights are `masked`: two of four take four bits either way. Scales are fp16. Vectors are read
as integers of 16 bits where weights are integers (a relative error of 2^-16 of the largest), as
fp32 otherwise; several vectors at once are rounded to bf16 where the processor multiplies that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.grids import Grid, round_groups, row_steps
from sparseworks.kernels.native import instruction_set, module

__all__ = ["Format", "Packed", "Panels", "pack_panels", "panel_product", "panel_product_reference",
           "unpack_panels"]  # fmt: skip

_ROWS = 16
_AFTER = 64  # bytes that may be read after the last panel
_CHUNK = 1 << 22  # weights that are packed at a time


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
    def group(self) -> int:
        """Columns that share a scale, or are kept together."""
        return {"MASKED_HALF": 128, "MASKED_INT8": 128, "MASKED_INT4": 64, "GROUP_INT4": 16,
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
        offset: int64 `[panels + 1]`, where each panel begins.

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


def pack_panels(
    weight: Tensor,
    format: Format,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
    zeros: bool = False,
) -> Packed:
    """Pack a matrix.

    Args:
        weight: `[rows, columns]`, any floating dtype.
        format: of the result. Codes are round(w / scale), with the scale of a group, among some,
            that leaves the least error, sum h (w - scale * code)^2. Weights that lie on such a grid
            already, with an fp16 step for each row, are packed as they are.
        mask: `[rows, columns]` bool, what is kept; None: the non-zeros. Formats without a mask take
            masked weights as 0.
        importance: `[columns]`, h of the error: the mean square of each input; None: 1.
        zeros: for `group-int4`: codes count from a zero point, weight = scale * (code - zero).

    Raises:
        InvalidArgument: not a matrix, a mask or importance of another shape, weights that are not
            finite.
    """
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise InvalidArgument(f"a matrix is packed, not {weight.dtype} {list(weight.shape)}")
    rows, columns = weight.shape
    if mask is not None and mask.shape != weight.shape:
        raise InvalidArgument(f"mask {list(mask.shape)} for a matrix {list(weight.shape)}")
    if importance is not None and importance.shape != (columns,):
        raise InvalidArgument(f"importance {list(importance.shape)} for {columns} columns")
    steps = row_steps(weight) if format.bits else None
    step = max(1, _CHUNK // (_ROWS * columns)) * _ROWS
    if importance is not None:
        importance = F.pad(importance.float(), (0, -columns % format.group), value=1.0)
    parts: list[Tensor] = []
    sizes: list[Tensor] = []
    lost = whole = 0.0
    count = 0
    for first in range(0, rows, step):
        part = weight[first : first + step].detach().float()
        if not bool(torch.isfinite(part).all()):
            raise InvalidArgument("NaN or Inf among the weights")
        kept = part != 0 if mask is None else mask[first : first + step].bool()
        fill = (0, -columns % format.group, 0, -part.shape[0] % _ROWS)
        part, kept = F.pad(part, fill), F.pad(kept, fill)
        part = part * kept
        given = None if steps is None else F.pad(steps[first : first + step], (0, fill[3]))
        data, size, rounded = _packed(part, kept, format, importance, zeros, given)
        parts.append(data)
        sizes.append(size)
        h = 1.0 if importance is None else importance.double()
        lost += float(((rounded - part).double().square() * h).sum())
        whole += float((part.double().square() * h).sum())
        count += int(torch.count_nonzero(part))
    offset = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(sizes).cumsum(0)])
    data = torch.cat([*parts, torch.zeros(_AFTER, dtype=torch.uint8)])
    zeros = zeros and format == Format.GROUP_INT4
    made = Panels(format, rows, columns, zeros, data, offset)
    return Packed(made, (lost / whole) ** 0.5 if whole else 0.0, count)


def _packed(
    weight: Tensor, kept: Tensor, format: Format, importance: Tensor | None, zeros: bool,
    steps: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Bytes of whole panels, how many each has, and the weights they stand for."""
    panels, columns = weight.shape[0] // _ROWS, weight.shape[1]
    if format == Format.FLOAT:
        flat = weight.view(panels, _ROWS, columns).transpose(1, 2).contiguous()
        return _bytes(flat), torch.full((panels,), columns * 64, dtype=torch.int64), weight
    if format == Format.HALF:
        value = weight.bfloat16()
        size = torch.full((panels,), columns * 32, dtype=torch.int64)
        return _bytes(_by_steps(value, 2)), size, value.float()
    if format == Format.MASKED_HALF:
        value = weight.bfloat16()
        made = _variable(_by_steps(value, 2), _by_steps(kept, 2), None, None, format)
        return *made, value.float()
    if format == Format.GROUP_INT4:
        live = kept.view(-1, columns // 16, 16).any(2)
        grid = round_groups(weight, kept, 16, 4, importance, zeros, steps)
        return *_grouped(grid, live, panels), grid.weight() * live.repeat_interleave(16, 1)
    grid = round_groups(weight, kept, format.group, format.bits, importance, False, steps)
    codes = grid.codes.view(weight.shape)
    scale = grid.scale.view(panels, _ROWS, -1).transpose(1, 2).contiguous()  # [panels, groups, 16]
    total = (grid.scale.double() * grid.codes.sum(-1, dtype=torch.float64)).sum(1)
    head = total.float().view(panels, _ROWS)
    if format.masked:
        made = _variable(_by_steps(codes, 4), _by_steps(kept, 4), scale, head, format)
        return *made, grid.weight()
    fours = _by_steps(codes, 4)  # [panels, steps, 16, 4]
    if format == Format.INT4:
        fours = _nibbles(fours[:, 0::2], fours[:, 1::2])
    body = fours.contiguous().view(torch.uint8).view(panels, scale.shape[1], -1)
    rows = torch.cat([_bytes(scale).view(panels, scale.shape[1], 32), body], 2).flatten(1)
    data = torch.cat([_bytes(head).view(panels, 64), rows], 1)
    size = torch.full((panels,), data.shape[1], dtype=torch.int64)
    return data.flatten(), size, grid.weight()


def _variable(
    value: Tensor, kept: Tensor, scale: Tensor | None, head: Tensor | None, format: Format
) -> tuple[Tensor, Tensor]:
    """Masked formats: value and kept `[panels, steps, 16, columns of a step]`."""
    panels, steps = kept.shape[:2]
    wide = kept.shape[2] * kept.shape[3]  # bits of a step: 32 or 64
    flags = kept.reshape(panels, steps, wide)
    words = _bits(flags)  # [panels, steps, wide / 8] uint8
    size = value.element_size()
    each = flags.sum(2)  # [panels, steps]
    four = format == Format.MASKED_INT4
    used = each.view(panels, steps // 2, 2).amax(2) if four else each
    per = format.group // (wide // _ROWS) // (2 if four else 1)  # counts of a group
    counts = used.view(panels, -1, per)  # [panels, groups, counts]
    groups = counts.shape[1]
    lead = (0 if scale is None else 32) + wide // 8 * (steps // groups)
    block = lead + counts.sum(2) * size  # [panels, groups]
    top = 0 if head is None else 64
    total = block.sum(1) + top
    start = _starts(total)[:, None] + top + _starts(block, 1)  # of each group
    data = torch.zeros(int(total.sum()), dtype=torch.uint8)
    if head is not None:
        _put(data, _starts(total), _bytes(head).view(panels, 64))
    if scale is not None:
        _put(data, start.flatten(), _bytes(scale).view(-1, 32))
    _put(data, start.flatten() + (0 if scale is None else 32), words.view(panels * groups, -1))
    place = start[:, :, None] + lead + _starts(counts * size, 2)  # of each count
    rank = flags.cumsum(2) - 1
    if four:
        where = place.view(panels, -1, 1).repeat_interleave(2, 1) + rank
        code = value.reshape(panels, steps, wide).to(torch.uint8) & 15
        odd = torch.arange(steps) % 2 == 1
        code = torch.where(odd[None, :, None], code << 4, code)
        for part in (~odd, odd):
            here = flags & part[None, :, None]
            data[where[here]] |= code[here]
        return data, total
    where = place.view(panels, steps, 1) + rank * size
    raw = _bytes(value.reshape(panels, steps, wide)[flags]).view(-1, size)
    _put(data, where[flags], raw)
    return data, total


def _grouped(grid: Grid, live: Tensor, panels: int) -> tuple[Tensor, Tensor]:
    """`group-int4`: live `[rows, groups]`; codes `[rows, groups, 16]`."""
    groups = live.shape[1]
    kept = live.view(panels, _ROWS, groups).transpose(1, 2)  # [panels, groups, 16]

    def order(t: Tensor) -> Tensor:
        return t.view(panels, _ROWS, groups, *t.shape[2:]).transpose(1, 2)

    codes, scale = order(grid.codes), order(grid.scale)
    zero = None if grid.zero is None else order(grid.zero)
    moved = grid.codes.double() if grid.zero is None else grid.codes.double() - grid.zero[..., None]
    head = (grid.scale.double() * moved.sum(-1) * live).sum(1).float().view(panels, _ROWS)
    count = kept.sum(2)
    block = count * (10 if zero is None else 11)
    total = block.sum(1) + 64 + 2 * groups
    start = _starts(total)[:, None] + 64 + 2 * groups + _starts(block, 1)
    data = torch.zeros(int(total.sum()), dtype=torch.uint8)
    _put(data, _starts(total), _bytes(head).view(panels, 64))
    _put(data, _starts(total) + 64, _bits(kept).view(panels, -1))
    rank = (kept.cumsum(2) - 1)[kept]
    begin = start[:, :, None].expand_as(kept)[kept]
    many = count[:, :, None].expand_as(kept)[kept]
    _put(data, begin + 2 * rank, _bytes(scale[kept]).view(-1, 2))
    begin = begin + 2 * many
    if zero is not None:
        data[begin + rank] = zero[kept].view(torch.uint8)
        begin = begin + many
    eight = codes[kept].view(-1, 2, 2, 4)  # [kept, eight columns, low or high, 4]
    packed = _nibbles(eight[:, :, 0], eight[:, :, 1])
    for half in range(2):
        _put(data, begin + 4 * (half * many + rank), packed[:, half].contiguous().view(torch.uint8))
    return data, total


def _by_steps(t: Tensor, wide: int) -> Tensor:
    """`[rows, columns]` as `[panels, steps, 16, wide]`."""
    rows, columns = t.shape
    return t.view(rows // _ROWS, _ROWS, columns // wide, wide).transpose(1, 2)


def _nibbles(low: Tensor, high: Tensor) -> Tensor:
    return (low.to(torch.uint8) & 15) | (high.to(torch.uint8) << 4)


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def _bits(flags: Tensor) -> Tensor:
    """The last axis as bytes, lowest bit first."""
    eight = flags.reshape(*flags.shape[:-1], -1, 8).to(torch.uint8)
    return (eight << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def _starts(sizes: Tensor, dim: int = 0) -> Tensor:
    return sizes.cumsum(dim) - sizes


def _put(data: Tensor, start: Tensor, rows: Tensor) -> None:
    """Rows of bytes, each at its own place."""
    for i in range(rows.shape[1]):
        data[start + i] = rows[:, i]


def unpack_panels(panels: Panels) -> Tensor:
    """The dense matrix `[rows, columns]`, fp32: scale * code, exactly. Slow; the reference."""
    fmt, group = panels.format, panels.format.group
    padded = -(-panels.columns // group) * group
    wide = torch.zeros(len(panels.offset) - 1, padded, _ROWS)
    for p in range(wide.shape[0]):
        at = int(panels.offset[p]) + (64 if fmt.bits else 0)
        live = at
        if fmt == Format.GROUP_INT4:
            at += padded // group * 2
        for c in range(0, padded, group):
            at = _read_group(panels, at, live + c // group * 2, wide[p, c : c + group])
    dense = wide.transpose(1, 2).reshape(-1, padded)
    return dense[: panels.rows, : panels.columns].contiguous()


def _read_group(panels: Panels, at: int, live: int, out: Tensor) -> int:
    """Fill `out` [columns of a group, 16]; returns where the next group begins. `live`: where it
    says which rows have the group."""
    fmt, group, data = panels.format, panels.format.group, panels.data

    def take(count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        nonlocal at
        size = torch.empty(0, dtype=dtype).element_size()
        found = data[at : at + count * size].clone().view(dtype)
        at += count * size
        return found

    def flags(count: int) -> Tensor:
        return ((take(count // 8)[:, None] >> torch.arange(8)) & 1).flatten().bool()

    if fmt == Format.FLOAT:
        out.copy_(take(group * _ROWS, torch.float32).view(group, _ROWS))
        return at
    if fmt == Format.HALF:
        pairs = take(group * _ROWS, torch.bfloat16).view(group // 2, _ROWS, 2)
        out.copy_(pairs.transpose(1, 2).reshape(group, _ROWS))
        return at
    if fmt == Format.GROUP_INT4:
        bits = panels.data[live : live + 2]
        kept = ((bits[:, None] >> torch.arange(8)) & 1).flatten().bool()
        count = int(kept.sum())
        scale = take(count, torch.float16).float()
        zero = take(count, torch.int8).float() if panels.zeros else torch.zeros(count)
        codes = _signed(take(count * group // 2).view(2, count, 4))
        value = codes.permute(2, 1, 0, 3).reshape(count, group) - zero[:, None]
        out[:, kept] = (value * scale[:, None]).T
        return at
    scale = take(_ROWS, torch.float16).float() if fmt.bits else torch.ones(_ROWS)
    step = 2 if fmt == Format.MASKED_HALF else 4
    if not fmt.masked:
        if fmt == Format.INT8:
            codes = take(group * _ROWS, torch.int8).view(-1, _ROWS, step).float()
        else:
            both = _signed(take(group * _ROWS // 2).view(-1, _ROWS, step))
            codes = torch.stack(list(both), 1).view(-1, _ROWS, step)
    else:
        kept = flags(group * _ROWS).view(-1, _ROWS, step)
        codes = torch.zeros(kept.shape)
        if fmt == Format.MASKED_INT4:
            for s in range(0, kept.shape[0], 2):
                counts = [int(kept[s].sum()), int(kept[s + 1].sum())]
                both = _signed(take(max(counts)))
                for i, count in enumerate(counts):
                    codes[s + i][kept[s + i]] = both[i][:count]
        else:
            dtype = torch.bfloat16 if fmt == Format.MASKED_HALF else torch.int8
            codes[kept] = take(int(kept.sum()), dtype).float()
    out.copy_((codes * scale[:, None]).transpose(1, 2).reshape(group, _ROWS))
    return at


def _signed(packed: Tensor) -> Tensor:
    """Low and high halves of bytes as `[2, ...]`, two's complement."""
    both = torch.stack([packed & 15, packed >> 4]).float()
    return both - 16 * (both > 7)


def panel_product_reference(panels: Panels, x: Tensor) -> Tensor:
    """y = x W^T through the dense matrix in torch."""
    return F.linear(x, unpack_panels(panels))


def panel_product(panels: Panels, x: Tensor, threads: int | None = None) -> Tensor:
    """y = x W^T for the vectors x `[tokens, columns]`, fp32.

    Raises:
        InvalidArgument: x of another shape or dtype.
    """
    if x.ndim != 2 or x.shape[1] != panels.columns or x.dtype != torch.float32:
        raise InvalidArgument(
            f"x is {x.dtype} {list(x.shape)}, the matrix takes fp32 [tokens, {panels.columns}]"
        )
    code = module()
    if code is None:
        return panel_product_reference(panels, x)
    instruction_set()  # refuses a forced set that is not there
    y = torch.empty(x.shape[0], panels.rows)
    if x.shape[0]:
        count = torch.get_num_threads() if threads is None else threads
        code.decoder.product(panels.native, x.detach().contiguous(), y, count)
    return y
