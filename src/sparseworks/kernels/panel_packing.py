"""Packing matrices into panels (see `panels`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.grids import Grid, round_groups, row_steps
from sparseworks.kernels.panels import ROW_OF_BYTE, Format, Packed, Panels

__all__ = ["pack_panels"]

_ROWS = 16
# rows of a tile, and what the rows of the last one are a multiple of
_TILES, _STRIPS = {Format.COLUMN_INT8: 4096, Format.COLUMN_INT4: 8192}, 128
_AFTER = 64  # bytes that may be read after the last panel
_LISTED = 64  # columns that an index counts
_CHUNK = 1 << 20  # weights that are packed at a time


def pack_panels(
    weight: Tensor,
    format: Format,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
    zeros: bool = False,
    grid: Grid | None = None,
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
        grid: the integers of the matrix, in the groups of `format`, which are packed as they are.

    Raises:
        InvalidArgument: not a matrix, a mask or importance of another shape, integers that the
            format does not take, weights that are not finite.
    """
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise InvalidArgument(f"a matrix is packed, not {weight.dtype} {list(weight.shape)}")
    rows, columns = weight.shape
    if mask is not None and mask.shape != weight.shape:
        raise InvalidArgument(f"mask {list(mask.shape)} for a matrix {list(weight.shape)}")
    if importance is not None and importance.shape != (columns,):
        raise InvalidArgument(f"importance {list(importance.shape)} for {columns} columns")
    if grid is not None:
        zeros = grid.zero is not None
        fitting = grid.fits(rows, columns, format.group, format.bits)
        if not fitting or (zeros and format != Format.GROUP_INT4):
            raise InvalidArgument(f"format {format.text} does not take these integers")
    steps = row_steps(weight) if format.bits and grid is None else None
    height = _TILES.get(format, _ROWS)
    fill_to = _STRIPS if format.by_columns else _ROWS
    step = max(1, _CHUNK // (height * columns)) * height
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
        fill = (0, -columns % format.group, 0, -part.shape[0] % fill_to)
        part, kept = F.pad(part, fill), F.pad(kept, fill)
        part = part * kept
        given = None if steps is None else F.pad(steps[first : first + step], (0, fill[3]))
        held = None if grid is None else grid.part(first, step, fill[3])
        data, size, rounded = _packed(part, kept, format, importance, zeros, given, held)
        parts.append(data)
        sizes.append(size)
        h = 1.0 if importance is None else importance.double()
        lost += float(((rounded - part).double().square() * h).sum())
        whole += float((part.double().square() * h).sum())
        count += int(torch.count_nonzero(part))
    offset = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(sizes).cumsum(0)])
    data = torch.cat([*parts, torch.zeros(_AFTER, dtype=torch.uint8)])
    made = Panels(format, rows, columns, zeros and format == Format.GROUP_INT4, data, offset)
    return Packed(made, (lost / whole) ** 0.5 if whole else 0.0, count)


def _packed(
    weight: Tensor, kept: Tensor, format: Format, importance: Tensor | None, zeros: bool,
    steps: Tensor | None, held: Grid | None = None,
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
        grid = held or round_groups(weight, kept, 16, 4, importance, zeros, steps)
        return *_grouped(grid, live, panels), grid.weight() * live.repeat_interleave(16, 1)
    grid = held or round_groups(weight, kept, format.group, format.bits, importance, False, steps)
    codes = grid.codes.view(weight.shape)
    if format.by_columns:
        return *_tiles(codes, grid.scale, format), grid.weight()
    scale = grid.scale.view(panels, _ROWS, -1).transpose(1, 2).contiguous()  # [panels, groups, 16]
    total = (grid.scale.double() * grid.codes.sum(-1, dtype=torch.float64)).sum(1)
    head = total.float().view(panels, _ROWS)
    if format.masked:
        made = _variable(_by_steps(codes, 4), _by_steps(kept, 4), scale, head, format)
        return *made, grid.weight()
    if format == Format.LISTED_INT8:
        return *_listed(codes, kept, scale, head), grid.weight()
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


def _listed(codes: Tensor, kept: Tensor, scale: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """`listed-int8`: codes and kept `[rows, columns]`, scale `[panels, groups, 16]`."""
    panels, groups = scale.shape[:2]
    blocks = 2 * groups  # of 64 columns
    kept = kept.view(-1, blocks, _LISTED)
    order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)  # kept columns first
    count = kept.sum(-1)
    filled = torch.arange(_LISTED) >= count[..., None]
    index = order.masked_fill(filled, 0).to(torch.uint8)
    code = codes.view(kept.shape).gather(-1, order).masked_fill(filled, 0)

    def fours(t: Tensor) -> Tensor:  # [panels, blocks, steps, 16, 4]
        return t.view(panels, _ROWS, blocks, -1, 4).permute(0, 2, 3, 1, 4)

    used = (-(-count // 4)).view(panels, _ROWS, blocks).transpose(1, 2)  # [panels, blocks, 16]
    live = torch.arange(_LISTED // 4)[:, None] < used[:, :, None]  # [panels, blocks, steps, 16]
    steps = used.amax((1, 2))  # [panels]
    many = live.sum(-1)  # [panels, blocks, steps]
    size = 8 * many.sum(-1)  # [panels, blocks]
    size[:, ::2] += 32
    lead = 64 + 4 + 2 * blocks * steps
    total = lead + size.sum(1)
    start = _starts(total)
    data = torch.zeros(int(total.sum()), dtype=torch.uint8)
    _put(data, start, _bytes(head).view(panels, 64))
    _put(data, start + 64, _bytes(steps.to(torch.int32)).view(panels, 4))
    step = torch.arange(_LISTED // 4)
    there = (step < steps[:, None])[:, None].expand_as(many)
    word = torch.arange(blocks)[:, None] * steps[:, None, None] + step  # [panels, blocks, steps]
    _put(data, (start[:, None, None] + 68 + 2 * word)[there], _bits(live)[there])
    begin = (start + lead)[:, None] + _starts(size, 1)  # [panels, blocks]
    _put(data, begin[:, ::2].flatten(), _bytes(scale).view(-1, 32))
    begin[:, ::2] += 32
    place = begin[..., None] + 8 * _starts(many, 2)  # [panels, blocks, steps]
    rank = 4 * (live.cumsum(-1) - 1)
    _put(data, (place[..., None] + rank)[live], fours(index)[live])
    where = place[..., None] + 4 * many[..., None] + rank
    _put(data, where[live], fours(code)[live].contiguous().view(torch.uint8))
    return data, total


def _tiles(codes: Tensor, scale: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """`column-int8` and `column-int4`: codes `[rows, columns]`, scale `[rows, groups]`."""
    four = format == Format.COLUMN_INT4
    strips = codes.view(-1, 64, codes.shape[1])[:, ROW_OF_BYTE].to(torch.int16)
    moved = (strips + (8 if four else 128)).to(torch.uint8)
    if four:
        moved = moved[0::2] | (moved[1::2] << 4)
    parts, sizes = [], []
    per = _TILES[format] // (128 if four else 64)
    for first in range(0, moved.shape[0], per):
        tile = moved[first : first + per].flatten(0, 1).T  # [columns, bytes]
        begin = first * (128 if four else 64)
        scales = scale[begin : begin + _TILES[format]].T.contiguous()  # [groups, rows]
        groups = scales.shape[0]
        body = tile.reshape(groups, -1)
        parts.append(torch.cat([_bytes(scales).view(groups, -1), body], 1).flatten())
        sizes.append(parts[-1].numel())
    return torch.cat(parts), torch.tensor(sizes)


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
