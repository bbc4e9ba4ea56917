"""Products of matrices in panels with vectors, and the dense matrices they stand for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.native import instruction_set, module
from sparseworks.kernels.panels import ROW_OF_BYTE, Format, Panels

__all__ = ["panel_product", "panel_product_reference", "unpack_panels"]

_ROWS = 16


def unpack_panels(panels: Panels) -> Tensor:
    """The dense matrix `[rows, columns]`, fp32: scale * code, exactly. Slow; the reference."""
    fmt, group = panels.format, panels.format.group
    padded = -(-panels.columns // group) * group
    if fmt.by_columns:
        return _read_tiles(panels, padded)[: panels.rows, : panels.columns].contiguous()
    wide = torch.zeros(len(panels.offset) - 1, padded, _ROWS)
    for p in range(wide.shape[0]):
        at = int(panels.offset[p]) + (64 if fmt.bits else 0)
        live = at
        if fmt == Format.LISTED_INT8:
            _read_listed(panels, at, wide[p])
            continue
        if fmt == Format.GROUP_INT4:
            at += padded // group * 2
        for c in range(0, padded, group):
            at = _read_group(panels, at, live + c // group * 2, wide[p, c : c + group])
    dense = wide.transpose(1, 2).reshape(-1, padded)
    return dense[: panels.rows, : panels.columns].contiguous()


def _read_tiles(panels: Panels, padded: int) -> Tensor:
    four, group = panels.format == Format.COLUMN_INT4, panels.format.group
    tiles = []
    for t in range(len(panels.offset) - 1):
        data = panels.data[int(panels.offset[t]) : int(panels.offset[t + 1])]
        each = data.view(padded // group, -1)  # [groups, 2 rows + group * bytes of a column]
        rows = each.shape[1] // (2 + group // 2 if four else 2 + group)
        scale = each[:, : 2 * rows].clone().view(torch.float16).float()  # [groups, rows]
        codes = each[:, 2 * rows :].reshape(padded, -1, 64)  # [columns, strips, bytes]
        if four:
            codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1, 2)
        value = torch.empty(codes.shape)
        value[:, :, ROW_OF_BYTE] = codes.float() - (8 if four else 128)
        tiles.append((value.view(padded, rows) * scale.repeat_interleave(group, 0)).T)
    return torch.cat(tiles)


def _read_listed(panels: Panels, at: int, out: Tensor) -> None:
    """Add to `out` [columns, 16] what a panel lists."""
    data, blocks = panels.data, out.shape[0] // 64
    steps = int(data[at : at + 4].clone().view(torch.int32))
    at += 4
    bits = data[at : at + 2 * blocks * steps].view(blocks, steps, 2)
    live = ((bits[..., None] >> torch.arange(8)) & 1).flatten(2).bool()
    at += 2 * blocks * steps
    scale = torch.zeros(_ROWS)
    for block in range(blocks):
        if block % 2 == 0:
            scale = data[at : at + 32].clone().view(torch.float16).float()
            at += 32
        for rows in live[block]:
            row = rows.nonzero().repeat(1, 4)
            column, code = data[at : at + 2 * row.numel()].view(2, -1, 4)
            at += 2 * row.numel()
            value = code.view(torch.int8).float() * scale[row]
            out.index_put_((64 * block + column.long(), row), value, accumulate=True)


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
