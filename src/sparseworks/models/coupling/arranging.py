"""Operations that put the entries of tensors elsewhere: views, pieces, repetitions, padding."""

from __future__ import annotations

import numpy as np

from sparseworks.models.coupling import shapes
from sparseworks.models.coupling.calls import Call
from sparseworks.models.coupling.pointwise import opaque
from sparseworks.models.coupling.provenance import FROZEN, Block, Provenance

__all__ = [
    "cat",
    "expand",
    "padded",
    "permute",
    "pixel_shuffle",
    "pixel_unshuffle",
    "repeat",
    "repeat_interleave",
    "reshape",
    "select",
    "sliced",
    "split",
    "stack",
    "transpose",
    "unbind",
]


def reshape(call: Call) -> Provenance:
    return shapes.reshape(call.atoms, call.first("self", "input"), call.shape)


def permute(call: Call) -> Provenance:
    tensor = call["self"]
    order = [d % len(tensor.shape) for d in call["dims"]]
    names = {d: i for i, d in enumerate(order)}
    return Provenance(call.shape, tuple(b.renamed(names) for b in tensor.blocks))


def transpose(call: Call) -> Provenance:
    tensor, rank = call["self"], len(call["self"].shape)
    a, b = (call.arguments.get(n, d) % max(1, rank) for n, d in (("dim0", 0), ("dim1", 1)))
    if rank < 2:
        return tensor  # type: ignore[no-any-return]
    names = {d: b if d == a else a if d == b else d for d in range(rank)}
    return Provenance(call.shape, tuple(x.renamed(names) for x in tensor.blocks))


def cat(call: Call) -> Provenance:
    dim = call.arguments.get("dim", 0)
    parts = [t for t in call["tensors"] if t.shape != (0,) and t.shape[dim]]
    parts = parts or call["tensors"][:1]  # all of them are empty
    return shapes.concatenate(call.atoms, parts, dim, call.shape)


def stack(call: Call) -> Provenance:
    dim = (call.arguments.get("dim") or 0) % len(call.shape)
    parts = [
        shapes.reshape(call.atoms, t, (*t.shape[:dim], 1, *t.shape[dim:])) for t in call["tensors"]
    ]
    return shapes.concatenate(call.atoms, parts, dim, call.shape)


def sliced(call: Call) -> Provenance:
    tensor, dim = call["self"], call.arguments.get("dim") or 0
    bounds = slice(call["start"], call["end"], call["step"] or 1)
    size = tensor.shape[dim]
    index = np.arange(size)[bounds]
    if len(index) == size:
        return tensor  # type: ignore[no-any-return]
    if call.held():
        return shapes.take(tensor, dim, index)
    parts, regular = [], True
    for other in call.siblings("self"):
        if (other.get("dim") or 0) % len(tensor.shape) == dim % len(tensor.shape):
            start, stop, _ = slice(other.get("start"), other.get("end"), None).indices(size)
            regular &= (other.get("step") or 1) == 1
            if (start, stop) != (0, size):
                parts.append((start, stop))
    shapes.pieces(call.atoms, tensor, dim, parts if regular else [(0, 0)])
    return shapes.take(tensor, dim, index)


def split(call: Call) -> list[Provenance]:
    tensor, dim = call["self"], call.arguments.get("dim") or 0
    ends = np.cumsum([s[dim] for s in call.shapes]).tolist()
    parts = list(zip([0, *ends], ends))
    if len(parts) > 1 and not (call.name == "split_with_sizes" and call.held()):
        shapes.pieces(call.atoms, tensor, dim, parts)
    return [shapes.take(tensor, dim, np.arange(a, b)) for a, b in parts]


def unbind(call: Call) -> list[Provenance]:
    tensor, dim = call["self"], call.arguments.get("dim") or 0
    n = tensor.shape[dim]
    shapes.pieces(call.atoms, tensor, dim, [(i, i + 1) for i in range(n)])
    return [shapes.take(tensor, dim, i) for i in range(n)]


def select(call: Call) -> Provenance:
    tensor, dim = call["self"], call["dim"]
    n = tensor.shape[dim]
    used = {o["index"] % n for o in call.siblings("self") if o["dim"] == dim}
    shapes.pieces(call.atoms, tensor, dim, [(i, i + 1) for i in used])
    return shapes.take(tensor, dim, call["index"] % n)


def expand(call: Call) -> Provenance:
    return shapes.expand(call.atoms, call["self"], call.shape)


def repeat(call: Call) -> Provenance:
    tensor, repeats = call["self"], call["repeats"]
    padded = (1,) * (len(repeats) - len(tensor.shape)) + tensor.shape
    out = shapes.reshape(call.atoms, tensor, padded)
    for dim, times in enumerate(repeats):
        if times != 1:
            if padded[dim] == 1:
                call.atoms.freeze(call.atoms.axis(out, dim))
            out = shapes.take(out, dim, np.tile(np.arange(padded[dim]), times))
    return out


def repeat_interleave(call: Call) -> Provenance:
    tensor, dim, times = call["self"], call["dim"], call["repeats"]
    if dim is None or not isinstance(times, int):
        return opaque(call)  # type: ignore[no-any-return]
    return shapes.take(tensor, dim, np.repeat(np.arange(tensor.shape[dim]), times))


def padded(call: Call) -> Provenance:
    """Padded entries are fixed in number, so whatever they meet stays."""
    tensor, pad, rank = call["self"], list(call["pad"]), len(call.shape)
    out = tensor
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        dim = rank - 1 - i
        if not (before or after) or out.block(dim) is None:
            continue
        block = out.block(dim)
        if min(before, after) < 0 or call.arguments.get("mode", "constant") != "constant":
            call.atoms.freeze(block.labels)
            labels = np.zeros(call.shape[dim], np.int64)
            block = Block((dim,), labels)
        else:
            widths = [(0, 0)] * len(block.dims)
            widths[block.dims.index(dim)] = (before, after)
            block = Block(block.dims, np.pad(block.labels, widths, constant_values=FROZEN))
        others = tuple(b for b in out.blocks if dim not in b.dims)
        out = Provenance(out.shape, (*others, block))
    return Provenance(call.shape, out.blocks)


def pixel_shuffle(call: Call) -> Provenance:
    tensor, r = call["self"], call["upscale_factor"]
    n, c, h, w = (1,) * (4 - len(tensor.shape)) + tensor.shape
    out = shapes.reshape(call.atoms, tensor, (n, c // r**2, r, r, h, w))
    order = {0: 0, 1: 1, 4: 2, 2: 3, 5: 4, 3: 5}
    moved = (n, c // r**2, h, r, w, r)
    out = Provenance(moved, tuple(b.renamed(order) for b in out.blocks))
    return shapes.reshape(call.atoms, out, call.shape)


def pixel_unshuffle(call: Call) -> Provenance:
    tensor, r = call["self"], call["downscale_factor"]
    n, c, h, w = (1,) * (4 - len(tensor.shape)) + tensor.shape
    out = shapes.reshape(call.atoms, tensor, (n, c, h // r, r, w // r, r))
    order = {0: 0, 1: 1, 3: 2, 5: 3, 2: 4, 4: 5}
    moved = (n, c, r, r, h // r, w // r)
    out = Provenance(moved, tuple(b.renamed(order) for b in out.blocks))
    return shapes.reshape(call.atoms, out, call.shape)
