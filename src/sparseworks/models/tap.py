"""Evidence at the operation: see the inputs of a parameter wherever it is multiplied.

Module hooks miss packed projections, functional calls and banks of experts. So the tap listens to
the dispatched operations (matrix products and convolutions) and recognises a parameter by its
storage; slices of it (one expert, the query part of an in-projection) are told apart by offset.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparseworks.models.matrix import View
from sparseworks.models.modes import evaluating
from sparseworks.models.recurrence import products_shown

__all__ = ["EvidenceTap", "calibration_mode", "conv_patches"]

_aten = torch.ops.aten
Listener = Callable[[View, Tensor, range, Tensor | None], None]


def conv_patches(
    inputs: Tensor,
    kernel: tuple[int, ...],
    stride: Iterable[int],
    padding: Iterable[int],
    dilation: Iterable[int],
) -> Tensor:
    """Patches `[batch * positions, taps, channels]` that a convolution multiplies, for any rank."""
    stride, padding, dilation = list(stride), list(padding), list(dilation)
    rank = len(kernel)
    stride, padding, dilation = (
        list(v) * rank if len(list(v)) == 1 else list(v) for v in (stride, padding, dilation)
    )
    pads = [p for pair in zip(reversed(padding), reversed(padding)) for p in pair]
    padded = nn.functional.pad(inputs, pads)
    sizes = [
        (padded.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(rank)
    ]
    taps = []
    for tap in itertools.product(*(range(k) for k in kernel)):
        window = padded
        for axis, offset in enumerate(tap):
            start = offset * dilation[axis]
            stop = start + stride[axis] * (sizes[axis] - 1) + 1
            window = window[(slice(None),) * (2 + axis) + (slice(start, stop, stride[axis]),)]
        taps.append(window.flatten(2).transpose(1, 2).flatten(0, 1))
    return torch.stack(taps, dim=1)


class EvidenceTap(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls a listener with the inputs `[tokens, in]` of watched parameters.

    Args:
        views: the parameters to watch.
        idle: a view whose product nothing that is listened to needs: it is told of, and its
            outputs are zeros instead. `misled` says whether something was told of after it.
        listener: called with (view, inputs, groups, outputs); `groups` are the matrices of the view
            that see these inputs, `outputs` `[tokens, out]` their product where it is known without
            a bias, else None. Products with the very same inputs, one after the other, give the
            same tensor object.

    Call `begin` before every batch where there are several.
    """

    def __init__(self, views: Iterable[View], listener: Listener, idle: View | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.listener, self.idle = listener, idle
        self.misled = self._over = False
        self.padding: Tensor | None = None
        self._last: _Seen | None = None
        self._by_storage: dict[int, list[View]] = {}
        for view in views:
            if view.parameter.is_meta:  # its weights are elsewhere now
                continue
            pointer = view.parameter.untyped_storage().data_ptr()
            self._by_storage.setdefault(pointer, []).append(view)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        unwanted = None if self.idle is None else self._unwanted(func, args)
        output = func(*args, **(kwargs or {})) if unwanted is None else unwanted
        handler(self, args, output)
        self._over |= unwanted is not None
        return output

    def begin(self, padding: Tensor | None) -> None:
        """A batch begins, whose padded tokens, False in `[batch, tokens]`, are left out."""
        self.padding, self._over = padding, False

    def _unwanted(self, func: Any, args: tuple[Any, ...]) -> Tensor | None:
        """Zeros of the shape of a product of the idle view; None of all others."""
        if func not in _OPERANDS:
            return None
        left, right = (args[i] for i in _OPERANDS[func])
        found = self._find(right)
        if found is None or found[0] is not self.idle:
            return None
        out = right.shape[0 if func is _aten.linear.default else 1]
        zeros: Tensor = left.new_zeros(*left.shape[:-1], out)
        return zeros

    def __exit__(self, *exception: Any) -> Any:
        self._last = None
        return super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _find(self, operand: Any) -> tuple[View, range] | None:
        """The watched view this operand is (a part of), and the groups it covers."""
        if not isinstance(operand, Tensor) or operand.is_sparse:
            return None
        views = self._by_storage.get(operand.untyped_storage().data_ptr())
        for view in views or ():
            parameter = view.parameter
            offset = operand.storage_offset() - parameter.storage_offset()
            if 0 <= offset < parameter.numel() and operand.numel() <= parameter.numel():
                size = parameter.numel() // view.groups
                first = offset // size
                return view, range(first, first + max(1, operand.numel() // size))
        return None

    def product(self, left: Tensor, right: Tensor, output: Tensor | None = None) -> None:
        """left [tokens, in] @ right [in, out], where either may be the parameter."""
        if (found := self._find(right)) is not None:
            self._tell(*found, left, output)
        elif (found := self._find(left)) is not None:
            self._tell(*found, right.t(), None if output is None else output.t())

    def batched_product(self, left: Tensor, right: Tensor) -> None:
        """left [e, tokens, in] @ right [e, in, out], one product per group."""
        if (found := self._find(right)) is not None:
            inputs = left
        elif (found := self._find(left)) is not None:
            inputs = right.transpose(1, 2)
        else:
            return
        view, groups = found
        if len(groups) == inputs.shape[0]:
            for group, part in zip(groups, inputs):
                self._tell(view, range(group, group + 1), part)
        else:
            self._tell(view, groups, inputs.flatten(0, 1))

    def grouped_product(self, left: Tensor, right: Tensor, ends: Tensor | None) -> None:
        """Rows of left [tokens, in] in runs that end at `ends`, one per matrix of right."""
        found = self._find(right)
        if found is None or ends is None or left.ndim != 2:
            return
        view, groups = found
        start = 0
        for group, end in zip(groups, ends.tolist()):
            if end > start:
                self._tell(view, range(group, group + 1), left[start:end])
            start = end

    def convolution(self, args: tuple[Any, ...]) -> None:
        inputs, weight, _, stride, padding, dilation, transposed = args[:7]
        found = self._find(weight)
        if found is None or transposed:
            return
        view, _ = found
        self.misled |= self._over
        channels = weight.shape[1]
        for start in range(0, inputs.shape[0], 16):
            part = inputs[start : start + 16]
            patches = conv_patches(part, tuple(weight.shape[2:]), stride, padding, dilation)
            for group in range(view.groups):
                own = patches[:, :, group * channels : (group + 1) * channels]
                self.listener(view, own.flatten(1), range(group, group + 1), None)

    def _tell(
        self, view: View, groups: range, inputs: Tensor, outputs: Tensor | None = None
    ) -> None:
        if inputs.shape[-1] != view.shape[1]:
            return
        self.misled |= self._over
        padding, tokens = self.padding, inputs.numel() // max(1, inputs.shape[-1])
        if padding is not None and tokens != padding.numel():
            padding = None
        if self._last is None or not self._last.is_of(inputs, padding):
            self._last = _Seen(inputs, padding)
        if outputs is not None and padding is not None:
            outputs = outputs[padding.flatten().to(outputs.device)]
        self.listener(view, self._last.rows, groups, outputs)


class _Seen:
    """Inputs `[..., in]` of a product, and their rows `[tokens, in]` without padded ones.

    As long as this lives nothing else can lie where they lie, so that place, shape and version say
    that another tensor has the same values.
    """

    def __init__(self, inputs: Tensor, padding: Tensor | None) -> None:
        self._inputs, self._padding = inputs, padding
        self._version = None if inputs.is_inference() else inputs._version
        self.rows = inputs.reshape(-1, inputs.shape[-1])
        if padding is not None:
            self.rows = self.rows[padding.flatten().to(inputs.device)]

    def is_of(self, inputs: Tensor, padding: Tensor | None) -> bool:
        """Are these the same numbers in the same place?"""
        mine = self._inputs
        if self._version is None or inputs.is_inference() or padding is not self._padding:
            return False
        return (
            mine.untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr()
            and mine.storage_offset() == inputs.storage_offset()
            and mine.shape == inputs.shape
            and mine.stride() == inputs.stride()
            and mine.dtype == inputs.dtype
            and mine.device == inputs.device
            and self._version == inputs._version
        )


def _no_bias(args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Outputs of `linear` as rows, where nothing was added."""
    return None if len(args) > 2 and args[2] is not None else output.flatten(0, -2)


_OPERANDS = {_aten.mm.default: (0, 1), _aten.addmm.default: (1, 2), _aten.linear.default: (0, 1)}
_HANDLERS: dict[Any, Callable[[EvidenceTap, tuple[Any, ...], Any], None]] = {
    _aten.mm.default: lambda tap, a, out: tap.product(a[0], a[1], out),
    _aten.addmm.default: lambda tap, a, _: tap.product(a[1], a[2]),
    _aten._addmm_activation.default: lambda tap, a, _: tap.product(a[1], a[2]),
    _aten.mv.default: lambda tap, a, _: tap.product(a[0], a[1][:, None]),
    _aten.addmv.default: lambda tap, a, _: tap.product(a[1], a[2][:, None]),
    _aten.linear.default: lambda tap, a, out: tap.product(
        a[0].flatten(0, -2), a[1].t(), _no_bias(a, out)
    ),
    _aten.bmm.default: lambda tap, a, _: tap.batched_product(a[0], a[1]),
    _aten.baddbmm.default: lambda tap, a, _: tap.batched_product(a[1], a[2]),
    _aten.convolution.default: lambda tap, a, _: tap.convolution(a),
}
if hasattr(_aten, "_grouped_mm"):
    _HANDLERS[_aten._grouped_mm.default] = lambda tap, a, _: tap.grouped_product(
        a[0], a[1], a[2] if len(a) > 2 else None
    )


@contextmanager
def calibration_mode(model: nn.Module, shown: bool = True) -> Any:
    """Evaluation mode without gradients, caches, or fused paths that hide the products.

    Args:
        shown: False where the caller enters `products_shown` itself, for the passes that need it.
    """
    changed: list[tuple[Any, str, Any]] = []
    for sub in {id(c): c for c in (getattr(m, "config", None) for m in model.modules())}.values():
        for key, value in (("use_cache", False), ("_experts_implementation", "eager")):
            if sub is not None and getattr(sub, key, None) not in (None, value):
                changed.append((sub, key, getattr(sub, key)))
                setattr(sub, key, value)
    with torch.no_grad(), products_shown() if shown else nullcontext(), evaluating(model):
        try:
            yield
        finally:
            for owner, key, value in changed:
                setattr(owner, key, value)
