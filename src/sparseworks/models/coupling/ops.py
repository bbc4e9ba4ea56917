"""What every operation of a graph does to the atoms of its operands.

An operation is known by its name without overload and without the underscore of in-place variants;
every operation that torch tags as pointwise is elementwise here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sparseworks.models.coupling import contractions, recurrences, shapes
from sparseworks.models.coupling.calls import Call
from sparseworks.models.coupling.provenance import FROZEN, Block, Provenance, frozen

__all__ = ["HANDLERS", "elementwise"]


def tensors(value: Any) -> list[Provenance]:
    """Every tensor in an argument."""
    if isinstance(value, Provenance):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return []


def elementwise(call: Call) -> Provenance:
    return call.atoms.elementwise(
        [t for v in call.arguments.values() for t in tensors(v)], call.shape
    )


def _same(call: Call) -> Provenance:
    return call.atoms.elementwise([call.first("self", "input")], call.shape)


def _constant(call: Call) -> Provenance:
    """Made in place: whatever it meets has to agree on its sizes."""
    return call.atoms.source(call.shape)


def _counted(call: Call) -> Provenance:
    """Made in place with values of their own: nothing of it can be cut."""
    return frozen(call.shape)


def _opaque(call: Call) -> Any:
    """Values or order decide: nothing that enters can be cut."""
    for value in call.arguments.values():
        for tensor in tensors(value):
            call.atoms.freeze_all(tensor)
    results = [frozen(s) for s in call.shapes]
    return results if len(results) > 1 else results[0]


def _reshape(call: Call) -> Provenance:
    return shapes.reshape(call.atoms, call.first("self", "input"), call.shape)


def _permute(call: Call) -> Provenance:
    tensor = call["self"]
    order = [d % len(tensor.shape) for d in call["dims"]]
    names = {d: i for i, d in enumerate(order)}
    return Provenance(call.shape, tuple(b.renamed(names) for b in tensor.blocks))


def _transpose(call: Call) -> Provenance:
    tensor, rank = call["self"], len(call["self"].shape)
    a, b = (call.arguments.get(n, d) % max(1, rank) for n, d in (("dim0", 0), ("dim1", 1)))
    if rank < 2:
        return tensor  # type: ignore[no-any-return]
    names = {d: b if d == a else a if d == b else d for d in range(rank)}
    return Provenance(call.shape, tuple(x.renamed(names) for x in tensor.blocks))


def _cat(call: Call) -> Provenance:
    parts = [t for t in call["tensors"] if t.shape != (0,)]
    return shapes.concatenate(call.atoms, parts, call.arguments.get("dim", 0), call.shape)


def _stack(call: Call) -> Provenance:
    dim = (call.arguments.get("dim") or 0) % len(call.shape)
    parts = [
        shapes.reshape(call.atoms, t, (*t.shape[:dim], 1, *t.shape[dim:])) for t in call["tensors"]
    ]
    return shapes.concatenate(call.atoms, parts, dim, call.shape)


def _slice(call: Call) -> Provenance:
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


def _split(call: Call) -> list[Provenance]:
    tensor, dim = call["self"], call.arguments.get("dim") or 0
    ends = np.cumsum([s[dim] for s in call.shapes]).tolist()
    parts = list(zip([0, *ends], ends))
    if len(parts) > 1 and not (call.name == "split_with_sizes" and call.held()):
        shapes.pieces(call.atoms, tensor, dim, parts)
    return [shapes.take(tensor, dim, np.arange(a, b)) for a, b in parts]


def _unbind(call: Call) -> list[Provenance]:
    tensor, dim = call["self"], call.arguments.get("dim") or 0
    n = tensor.shape[dim]
    shapes.pieces(call.atoms, tensor, dim, [(i, i + 1) for i in range(n)])
    return [shapes.take(tensor, dim, i) for i in range(n)]


def _select(call: Call) -> Provenance:
    tensor, dim = call["self"], call["dim"]
    n = tensor.shape[dim]
    used = {o["index"] % n for o in call.siblings("self") if o["dim"] == dim}
    shapes.pieces(call.atoms, tensor, dim, [(i, i + 1) for i in used])
    return shapes.take(tensor, dim, call["index"] % n)


def _index(call: Call) -> Provenance:
    """x[i, j, :] with tensors of indices: their axes are fixed, the others pass."""
    tensor, indices = call["self"], list(call["indices"])
    rank = len(tensor.shape)
    indices += [None] * (rank - len(indices))
    used = [d for d, i in enumerate(indices) if i is not None]
    tensor = call.atoms.collapsed(tensor, [d for d in range(rank) if d not in used])
    for dim in used:
        call.atoms.freeze(call.atoms.axis(tensor, dim))
    for index in indices:
        if index is not None:
            call.atoms.freeze_all(index)
    extra = len(call.shape) - (rank - len(used))
    together = used == list(range(used[0], used[-1] + 1))
    at = used[0] if together else 0
    kept = [d for d in range(rank) if d not in used]
    names = {d: i if i < at else i + extra for i, d in enumerate(kept)}
    blocks = [b.renamed(names) for b in tensor.blocks if not set(b.dims) & set(used)]
    fixed = [Block((at + i,), np.zeros(call.shape[at + i], np.int64)) for i in range(extra)]
    return Provenance(call.shape, (*blocks, *fixed))


def _index_put(call: Call) -> Provenance:
    tensor, values = call["self"], call["values"]
    for dim, index in enumerate(call["indices"]):
        if index is not None:
            call.atoms.freeze(call.atoms.axis(tensor, dim))
    return call.atoms.elementwise(
        [tensor, Provenance(values.shape, values.blocks)]
        if len(values.shape) <= len(tensor.shape)
        else [tensor],
        call.shape,
    )


def _index_add(call: Call) -> Provenance:
    tensor, source, dim = call["self"], call["source"], call["dim"] % len(call.shape)
    for t in (tensor, source):
        call.atoms.freeze(call.atoms.axis(t, dim))
    fixed = Provenance((*source.shape[:dim], 1, *source.shape[dim + 1 :]))
    others = tuple(b for b in source.blocks if dim not in b.dims)
    return call.atoms.elementwise([tensor, Provenance(fixed.shape, others)], call.shape)


def _index_select(call: Call) -> Provenance:
    tensor, dim = call["self"], call["dim"]
    call.atoms.freeze(call.atoms.axis(tensor, dim))
    out = call.atoms.collapsed(tensor, [d for d in range(len(tensor.shape)) if d != dim])
    return shapes.take(out, dim, np.zeros(call.shape[dim], np.int64))


def _embedding(call: Call) -> Provenance:
    weight, ids = call["weight"], call["indices"]
    call.atoms.freeze(call.atoms.axis(weight, 0))
    call.atoms.freeze_all(ids)
    last = len(call.shape) - 1
    fixed = [Block((d,), np.zeros(n, np.int64)) for d, n in enumerate(call.shape[:-1])]
    return Provenance(call.shape, (*fixed, Block((last,), call.atoms.axis(weight, 1))))


def _expand(call: Call) -> Provenance:
    return shapes.expand(call.atoms, call["self"], call.shape)


def _repeat(call: Call) -> Provenance:
    tensor, repeats = call["self"], call["repeats"]
    padded = (1,) * (len(repeats) - len(tensor.shape)) + tensor.shape
    out = shapes.reshape(call.atoms, tensor, padded)
    for dim, times in enumerate(repeats):
        if times != 1:
            if padded[dim] == 1:
                call.atoms.freeze(call.atoms.axis(out, dim))
            out = shapes.take(out, dim, np.tile(np.arange(padded[dim]), times))
    return out


def _repeat_interleave(call: Call) -> Provenance:
    tensor, dim, times = call["self"], call["dim"], call["repeats"]
    if dim is None or not isinstance(times, int):
        return _opaque(call)  # type: ignore[no-any-return]
    return shapes.take(tensor, dim, np.repeat(np.arange(tensor.shape[dim]), times))


def _pad(call: Call) -> Provenance:
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


def _reduction(call: Call) -> Any:
    tensor = call.first("self", "input")
    dims = call["dim"]
    dims = [] if dims is None else [dims] if isinstance(dims, int) else list(dims)
    keep = bool(call.arguments.get("keepdim", False))
    reason = "" if call.name.startswith("sum") else f"{call.name} over channels"
    out = shapes.reduce(call.atoms, tensor, dims, keep, reason)
    return [out] * len(call.shapes) if len(call.shapes) > 1 else out


def _softmax(call: Call) -> Provenance:
    tensor = call["self"]
    if (block := tensor.block(call["dim"])) is not None:
        call.atoms.statistic(block.labels, "softmax over channels")
    return call.atoms.elementwise([tensor], call.shape)


def _ordered(call: Call) -> Provenance:
    """roll, flip, cumsum: the order of these axes matters, so they stay."""
    tensor, dims = call["self"], call.first("dims", "dim")
    for dim in [dims] if isinstance(dims, int) else dims:
        call.atoms.freeze(call.atoms.axis(tensor, dim))
    return call.atoms.elementwise([tensor], call.shape)


def _spatial(call: Call) -> Any:
    """Pooling and interpolation: batch and channels pass, space stays."""
    tensor = call.first("self", "input")
    rank = len(tensor.shape)
    spatial = [d for d, n in enumerate(call.shape) if d >= 2 or (rank == 3 and d >= 1 and n == 0)]
    out = call.atoms.collapsed(tensor, [d for d in range(rank) if d not in spatial])
    blocks = [b for b in out.blocks if not set(b.dims) & set(spatial)]
    for dim in spatial:
        call.atoms.freeze(call.atoms.axis(out, dim))
    fixed = [Block((d,), np.zeros(call.shape[d], np.int64)) for d in spatial]
    result = Provenance(call.shape, (*blocks, *fixed))
    return [result] * len(call.shapes) if len(call.shapes) > 1 else result


def _pixel_shuffle(call: Call) -> Provenance:
    tensor, r = call["self"], call["upscale_factor"]
    n, c, h, w = (1,) * (4 - len(tensor.shape)) + tensor.shape
    out = shapes.reshape(call.atoms, tensor, (n, c // r**2, r, r, h, w))
    order = {0: 0, 1: 1, 4: 2, 2: 3, 5: 4, 3: 5}
    moved = (n, c // r**2, h, r, w, r)
    out = Provenance(moved, tuple(b.renamed(order) for b in out.blocks))
    return shapes.reshape(call.atoms, out, call.shape)


def _pixel_unshuffle(call: Call) -> Provenance:
    tensor, r = call["self"], call["downscale_factor"]
    n, c, h, w = (1,) * (4 - len(tensor.shape)) + tensor.shape
    out = shapes.reshape(call.atoms, tensor, (n, c, h // r, r, w // r, r))
    order = {0: 0, 1: 1, 3: 2, 5: 3, 2: 4, 4: 5}
    moved = (n, c, r, r, h // r, w // r)
    out = Provenance(moved, tuple(b.renamed(order) for b in out.blocks))
    return shapes.reshape(call.atoms, out, call.shape)


_GROUPS: dict[Callable[[Call], Any], str] = {
    _same: "dropout feature_dropout contiguous clone to _to_copy type_as alias detach gelu relu "
    "native_dropout alpha_dropout lift_fresh_copy lift_fresh hardtanh relu6 silu mish elu selu "
    "zeros_like ones_like empty_like full_like randn_like rand_like leaky_relu hardswish "
    "hardsigmoid softplus logsigmoid float half bfloat16 identity sized",
    elementwise: "masked_fill where prelu add mul sub div pow copy lerp __and__ __or__ __xor__ "
    "logical_and logical_or maximum minimum floor_divide remainder rsub",
    _constant: "full zeros ones empty new_ones new_zeros new_full new_empty scalar_tensor",
    _counted: "arange rand randn eye linspace logspace",
    _opaque: "topk sort argsort argmax argmin nonzero one_hot bincount histc gather scatter "
    "scatter_add scatter_reduce unique searchsorted multinomial bucketize tril triu diagonal "
    "masked_select item _local_scalar_dense",
    _reshape: "view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as reshape_as",
    _permute: "permute",
    _transpose: "transpose t swapaxes",
    _cat: "cat concat",
    _stack: "stack",
    _slice: "slice",
    _split: "split split_with_sizes chunk tensor_split",
    _unbind: "unbind",
    _select: "select",
    _index: "index",
    _index_put: "index_put",
    _index_add: "index_add",
    _index_select: "index_select",
    _embedding: "embedding",
    _expand: "expand expand_as broadcast_to",
    _repeat: "repeat",
    _repeat_interleave: "repeat_interleave",
    _pad: "pad constant_pad_nd",
    _reduction: "mean sum amax amin var std max min any all prod logsumexp var_mean norm "
    "linalg_vector_norm",
    _softmax: "softmax log_softmax _softmax _safe_softmax",
    _ordered: "roll flip cumsum cumprod",
    _spatial: "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d "
    "max_pool2d_with_indices _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d",
    _pixel_shuffle: "pixel_shuffle",
    _pixel_unshuffle: "pixel_unshuffle",
    contractions.linear: "linear",
    contractions.matmul: "matmul bmm mm mv dot addmm baddbmm",
    contractions.attention: "scaled_dot_product_attention",
    contractions.convolution: "conv1d conv2d conv3d convolution",
    contractions.transposed_convolution: "conv_transpose1d conv_transpose2d conv_transpose3d",
    contractions.batch_norm: "batch_norm _native_batch_norm_legit_no_training instance_norm",
    contractions.layer_norm: "layer_norm rms_norm native_layer_norm",
    contractions.group_norm: "group_norm native_group_norm",
    contractions.grouped_matmul: "grouped_mm_fallback _grouped_mm",
    recurrences.layers: "lstm gru rnn_tanh rnn_relu",
    recurrences.cell: "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
}
HANDLERS: dict[str, Callable[[Call], Any]] = {
    name: handler for handler, names in _GROUPS.items() for name in names.split()
}
