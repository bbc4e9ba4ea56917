"""Operations that end an axis: products, convolutions, attention; and normalisations.

A joint block that reaches a product as batch axis and matrix axis at once (heads and their
channels) is told by the batch axis: whole heads go.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sparseworks.models.coupling.calls import Call
from sparseworks.models.coupling.provenance import Block, Labels, Provenance

__all__ = [
    "attention",
    "batch_norm",
    "convolution",
    "group_norm",
    "grouped_matmul",
    "layer_norm",
    "linear",
    "matmul",
    "transposed_convolution",
]


def _shared(call: Call, tensor: Provenance, last: list[int]) -> Provenance:
    """Blocks over batch and matrix axes told by the batch axes."""
    blocks: list[Block] = []
    for block in tensor.blocks:
        inner = [d for d in block.dims if d in last]
        outer = [d for d in block.dims if d not in last]
        if inner and outer:
            blocks += call.atoms.collapse(block, outer)
        elif len(inner) > 1:
            blocks += call.atoms.collapse(block, inner[:1])
        else:
            blocks.append(block)
    return Provenance(tensor.shape, tuple(blocks))


def _outer(tensor: Provenance, but: list[int]) -> list[Labels]:
    return [b.labels for b in tensor.blocks if not set(b.dims) & set(but)]


def linear(call: Call) -> Provenance:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    last = len(x.shape) - 1
    x = _shared(call, x, [last])
    call.atoms.link(call.atoms.axis(x, last), call.atoms.axis(weight, 1))
    out = call.atoms.axis(weight, 0)
    if bias is not None:
        out = call.atoms.link(out, call.atoms.axis(bias, 0))
    call.cost(
        math.prod(x.shape) * weight.shape[0],
        call.atoms.axis(weight, 1),
        out,
        *_outer(x, [last]),
    )
    kept = tuple(b for b in x.blocks if last not in b.dims)
    return Provenance(call.shape, (*kept, Block((len(call.shape) - 1,), out)))


def matmul(call: Call) -> Provenance:
    a, b = call.first("self", "batch1", "mat1"), call.first("other", "batch2", "mat2", "vec")
    added = None
    if call.name.startswith(("addmm", "baddbmm")):
        added = call["self"]
        a, b = call.first("mat1", "batch1"), call.first("mat2", "batch2")
    elif call["tensor"] is not None:
        b = call["tensor"]
    shape = call.shape
    if len(a.shape) == 1:
        a = Provenance((1, *a.shape), tuple(x.renamed({0: 1}) for x in a.blocks))
        shape = (*shape[: len(shape) - (len(b.shape) > 1)], 1, *shape[-1:][: len(b.shape) > 1])
    if len(b.shape) == 1:
        b = Provenance((*b.shape, 1), b.blocks)
        shape = (*shape, 1)
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    ra, rb, ro = len(a.shape), len(b.shape), len(shape)
    a = _shared(call, a, [ra - 1]) if ra == 2 else _shared(call, a, [ra - 2, ra - 1])
    b = _shared(call, b, [rb - 2]) if rb == 2 else _shared(call, b, [rb - 2, rb - 1])
    inner = call.atoms.link(call.atoms.axis(a, ra - 1), call.atoms.axis(b, rb - 2))
    rows, columns = call.atoms.axis(a, ra - 2), call.atoms.axis(b, rb - 1)
    batch_a = Provenance(
        a.shape[:-2], tuple(x for x in a.blocks if not set(x.dims) & {ra - 2, ra - 1})
    )
    batch_b = Provenance(
        b.shape[:-2], tuple(x for x in b.blocks if not set(x.dims) & {rb - 2, rb - 1})
    )
    batch = call.atoms.elementwise([batch_a, batch_b], shape[:-2])
    call.cost(
        math.prod(shape[:-2]) * m * k * n,
        inner,
        rows,
        columns,
        *(x.labels for x in batch.blocks),
    )
    ends = [Block((ro - 2,), rows), Block((ro - 1,), columns)]
    out = Provenance(tuple(shape), (*batch.blocks, *ends))
    if added is not None:
        out = call.atoms.elementwise([out, added], out.shape)
    if tuple(shape) != call.shape:
        from sparseworks.models.coupling.shapes import reshape

        return reshape(call.atoms, out, call.shape)
    return out


def grouped_matmul(call: Call) -> Provenance:
    """Rows of `[tokens, in]` each times one of `[experts, in, out]`; the experts stay."""
    x, weight = call.first("input", "self"), call.first("weight", "mat2")
    call.atoms.freeze(call.atoms.axis(weight, 0))
    inner = call.atoms.link(call.atoms.axis(x, 1), call.atoms.axis(weight, 1))
    out = call.atoms.axis(weight, 2)
    for labels in (inner, out):
        call.atoms.multiples.append((labels, 8))  # its kernels want rows of whole 16 bytes
    call.cost(x.shape[0] * x.shape[1] * weight.shape[2], inner, out)
    rows = tuple(b for b in x.blocks if 1 not in b.dims)
    return Provenance(call.shape, (*rows, Block((1,), out)))


def attention(call: Call) -> Provenance:
    query, key, value = call["query"], call["key"], call["value"]
    rank = len(query.shape)
    ends = [rank - 2, rank - 1]
    query, key, value = (_shared(call, t, ends) for t in (query, key, value))
    for tensor in (query, key):
        call.atoms.freeze(call.atoms.axis(tensor, rank - 1))
    tokens = call.atoms.axis(query, rank - 2)
    keys, values = _batch(query, key), _batch(query, value)
    operands = [_batch(query, query), keys, values]
    mask = call["attn_mask"]
    if mask is not None:
        mask = _shared(call, mask, [len(mask.shape) - 2, len(mask.shape) - 1])
        if len(mask.shape) > 2:
            operands.append(
                Provenance(
                    mask.shape[:-2],
                    tuple(b for b in mask.blocks if max(b.dims) < len(mask.shape) - 2),
                )
            )
    batch = call.atoms.elementwise(operands, query.shape[:-2])
    heads = [b.labels for b in batch.blocks]
    macs = math.prod(query.shape[:-2]) * query.shape[-2] * key.shape[-2]
    call.cost(macs * (query.shape[-1] + value.shape[-1]), *heads)
    fixed = [
        Block((rank - 2,), tokens),
        Block((rank - 1,), call.atoms.axis(value, rank - 1)),
    ]
    return Provenance(call.shape, (*batch.blocks, *fixed))


def _batch(query: Provenance, tensor: Provenance) -> Provenance:
    """The axes before the last two; fewer key heads are repeated to those of the query."""
    rank = len(query.shape)
    blocks = tuple(b for b in tensor.blocks if max(b.dims) < rank - 2)
    have, want = tensor.shape[rank - 3], query.shape[rank - 3]
    if rank > 2 and have not in (1, want):
        blocks = tuple(
            Block(b.dims, b.labels.repeat(want // have, axis=b.dims.index(rank - 3)))
            if rank - 3 in b.dims
            else b
            for b in blocks
        )
        return Provenance(query.shape[: rank - 2], blocks)
    return Provenance(tensor.shape[: rank - 2], blocks)


def convolution(call: Call) -> Provenance:
    if call["transposed"]:
        return transposed_convolution(call)
    x, weight = call["input"], call["weight"]
    groups = call.arguments.get("groups") or 1
    channel = len(x.shape) - len(weight.shape) + 1
    source = call.atoms.axis(x, channel)
    out, inner = call.atoms.axis(weight, 0), call.atoms.axis(weight, 1)
    out = _couple(call, source, inner, out, groups)
    macs = math.prod(call.shape) * math.prod(weight.shape[1:])
    return _convolved(call, x, weight, channel, out, inner, macs)


def transposed_convolution(call: Call) -> Provenance:
    x, weight = call["input"], call["weight"]
    groups = call.arguments.get("groups") or 1
    channel = len(x.shape) - len(weight.shape) + 1
    source = call.atoms.link(call.atoms.axis(x, channel), call.atoms.axis(weight, 0))
    inner = call.atoms.axis(weight, 1)
    if groups == 1:
        out = inner
    else:
        per = weight.shape[1]
        call.atoms.merge(source.reshape(groups, -1))
        out = np.repeat(call.atoms.merge(source.reshape(groups, -1)), per)
        call.atoms.freeze(inner)
    macs = math.prod(x.shape) * math.prod(weight.shape[1:])
    return _convolved(call, x, weight, channel, out, source, macs)


def _convolved(
    call: Call,
    x: Provenance,
    weight: Provenance,
    channel: int,
    out: Labels,
    inner: Labels,
    macs: float,
) -> Provenance:
    for dim in range(2, len(weight.shape)):
        call.atoms.freeze(call.atoms.axis(weight, dim))
    for dim in range(channel + 1, len(x.shape)):
        call.atoms.freeze(call.atoms.axis(x, dim))
    if call["bias"] is not None:
        out = call.atoms.link(out, call.atoms.axis(call["bias"], 0))
    call.cost(macs, out, inner)
    fixed = [
        Block((d,), np.zeros(call.shape[d], np.int64))
        for d in range(len(call.shape))
        if d != channel
    ]
    return Provenance(call.shape, (*fixed, Block((channel,), out)))


def _couple(call: Call, source: Labels, inner: Labels, out: Labels, groups: int) -> Labels:
    """Tie input channels, the weight's input axis and output channels; returns the latter."""
    if groups == 1:
        call.atoms.link(source, inner)
        return out
    if len(inner) == 1:
        call.atoms.freeze(inner)
        rows = np.concatenate([source[:, None], out.reshape(groups, -1)], axis=1)
        return np.repeat(call.atoms.merge(rows), len(out) // groups)
    # every group loses the same inputs and the same outputs, so that their number stays
    call.atoms.merge(np.concatenate([source.reshape(groups, -1), inner[None]]).T)
    return np.tile(call.atoms.merge(out.reshape(groups, -1).T), groups)


def batch_norm(call: Call) -> Any:
    x = call["input"]
    labels = call.atoms.axis(x, 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name] is not None:
            labels = call.atoms.link(labels, call.atoms.axis(call[name], 0))
    blocks = [b for b in call.atoms.collapsed(x, [1]).blocks if 1 not in b.dims]
    if call.first("training", "use_input_stats"):
        for block in blocks:
            call.atoms.statistic(block.labels, "normalised over what is given")
    out = Provenance(x.shape, (*blocks, Block((1,), labels)))
    return _outputs(call, out)


def layer_norm(call: Call) -> Any:
    x = call["input"]
    first = len(x.shape) - len(call["normalized_shape"])
    for block in x.blocks:
        if any(d >= first for d in block.dims):
            call.atoms.statistic(block.labels, "normalised over channels")
    operands = [t for t in (x, call["weight"], call["bias"]) if t is not None]
    return _outputs(call, call.atoms.elementwise(operands, x.shape))


def group_norm(call: Call) -> Any:
    """Whole groups go, which changes no statistic; with one group single channels go."""
    x = call["input"]
    groups = call.first("num_groups", "group")
    labels = call.atoms.axis(x, 1)
    width = len(labels) // groups
    if groups == 1:
        call.atoms.statistic(labels, "normalised over channels")
    elif width > 1:
        labels = np.repeat(call.atoms.merge(labels.reshape(groups, width)), width)
    for name in ("weight", "bias"):
        if call[name] is not None:
            labels = call.atoms.link(labels, call.atoms.axis(call[name], 0))
    blocks = [b for b in call.atoms.collapsed(x, [1]).blocks if 1 not in b.dims]
    return _outputs(call, Provenance(x.shape, (*blocks, Block((1,), labels))))


def _outputs(call: Call, out: Provenance) -> Any:
    """Native normalisations also return their statistics."""
    if len(call.shapes) == 1:
        return out
    return [out, *(Provenance(s) for s in call.shapes[1:])]
