"""What every operation of a graph does to the atoms of its operands.

An operation is known by its name without overload and without the underscore of in-place variants;
every operation that torch tags as pointwise is elementwise here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparseworks.models.coupling import (
    arranging,
    contractions,
    indexing,
    pointwise,
    recurrences,
    reducing,
)
from sparseworks.models.coupling.calls import Call
from sparseworks.models.coupling.pointwise import elementwise

__all__ = ["HANDLERS", "elementwise"]

_GROUPS: dict[Callable[[Call], Any], str] = {
    pointwise.same: "dropout feature_dropout contiguous clone to _to_copy type_as alias detach "
    "gelu relu native_dropout alpha_dropout lift_fresh_copy lift_fresh hardtanh relu6 silu mish "
    "elu selu zeros_like ones_like empty_like full_like randn_like rand_like leaky_relu hardswish "
    "hardsigmoid softplus logsigmoid float half bfloat16 identity sized",
    pointwise.elementwise: "masked_fill where prelu add mul sub div pow copy lerp __and__ __or__ "
    "__xor__ logical_and logical_or maximum minimum floor_divide remainder rsub",
    pointwise.constant: "full zeros ones empty new_ones new_zeros new_full new_empty scalar_tensor",
    pointwise.counted: "arange rand randn eye linspace logspace",
    pointwise.opaque: "topk sort argsort argmax argmin nonzero one_hot bincount histc gather "
    "scatter scatter_add scatter_reduce unique searchsorted multinomial bucketize tril triu "
    "diagonal masked_select item _local_scalar_dense",
    arranging.reshape: "view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as "
    "reshape_as",
    arranging.permute: "permute",
    arranging.transpose: "transpose t swapaxes",
    arranging.cat: "cat concat",
    arranging.stack: "stack",
    arranging.sliced: "slice",
    arranging.split: "split split_with_sizes chunk tensor_split",
    arranging.unbind: "unbind",
    arranging.select: "select",
    indexing.indexed: "index",
    indexing.index_put: "index_put",
    indexing.index_add: "index_add",
    indexing.index_select: "index_select",
    indexing.embedding: "embedding",
    arranging.expand: "expand expand_as broadcast_to",
    arranging.repeat: "repeat",
    arranging.repeat_interleave: "repeat_interleave",
    arranging.padded: "pad constant_pad_nd",
    reducing.reduction: "mean sum amax amin var std max min any all prod logsumexp var_mean norm "
    "linalg_vector_norm",
    reducing.softmax: "softmax log_softmax _softmax _safe_softmax",
    reducing.ordered: "roll flip cumsum cumprod",
    reducing.spatial: "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d "
    "max_pool2d_with_indices _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d",
    arranging.pixel_shuffle: "pixel_shuffle",
    arranging.pixel_unshuffle: "pixel_unshuffle",
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
