"""BDWP (Fang et al. 2023, Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and
Dataflow Co-Design, arXiv:2309.13015): N:M in the forward and in the backward product.

The dense theta `[out, in]` is pruned twice, along the axis that each product sums over:

    y  = x (E_f * theta)^T       E_f: n of every m consecutive inputs, of each output
    dx = dy (E_b * theta)        E_b: n of every m consecutive outputs, of each input
    dtheta = dy^T x + lambda (1 - E_f) * theta                                     dense

E_b is chosen from theta, not from E_f * theta, so the two masks differ and dx is biased. Two of the
three products of a training step take n/m of the multiplications: 2 n/m + 1 of 3 units. In
convolutions inputs and outputs are channels at a fixed tap. A layer whose outputs m does not divide
stays dense.

The paper has no released code; lambda and the term on E_f are those of the authors' SR-STE. With
`backward="nested"` E_b is chosen within E_f (as Zhang et al. 2023, Bi-directional Masks for
Efficient N:M Sparse Training, arXiv:2302.06058, who permute rows besides), with "random" it is
drawn anew every step.

In our quick setting (claim 067: four convolutions from scratch at 2:8, 120 steps, 32 seeds) BDWP
is as accurate as SR-STE (39.5 and 39.7 %; dense 40.4) at half the multiplications; a random
backward mask is not certainly worse (0.009 nats, -0.002 to 0.021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import NM, Pattern
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.kernels.zeroing import keep_only
from sparseworks.models.views import View
from sparseworks.training.sharding import is_sharded
from sparseworks.training.swapping import StraightThroughRun
from sparseworks.weights.semistructured.sr_ste import SRSTE

__all__ = ["BDWP", "both_ways_conv", "both_ways_linear", "mac_share"]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, back: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, back)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, back = ctx.saved_tensors
        for_x, for_weight, _, for_bias = ctx.needs_input_grad
        rows = g.reshape(-1, g.shape[-1])
        return (
            g.matmul(back) if for_x else None,
            rows.t().mm(x.reshape(-1, x.shape[-1])) if for_weight else None,
            None,
            rows.sum(0) if for_bias else None,
        )


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, back: Tensor, bias: Tensor | None, *settings: Any
    ) -> Tensor:
        ctx.save_for_backward(x, back)
        ctx.settings = settings
        y: Tensor = torch.ops.aten.convolution.default(x, weight, bias, *settings)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, back = ctx.saved_tensors
        for_x, for_weight, _, for_bias, *_ = ctx.needs_input_grad
        # only the gradient of x reads the weight that is given
        dx, dw, db = torch.ops.aten.convolution_backward.default(
            g, x, back, [back.shape[0]], *ctx.settings, [for_x, for_weight, for_bias]
        )
        return dx, dw, None, db, *(None for _ in ctx.settings)


def both_ways_linear(x: Tensor, weight: Tensor, back: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, whose gradient goes to x through `back`: dx = dy back.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`; its gradient is dy^T x, dense.
        back: `[out, in]`; no gradient.
    """
    found: Tensor = _Linear.apply(*_autocast(x, weight, back, bias))  # type: ignore[no-untyped-call]
    return found


def both_ways_conv(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, weight: Tensor, back: Tensor
) -> Tensor:
    """What a convolution computes with `weight`, whose gradient goes to x through `back`."""
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = (0,) * len(layer.kernel_size)
    given = _autocast(x, weight, back, layer.bias)
    still = [0] * len(layer.kernel_size)
    settings = [layer.stride, padding, layer.dilation, False, still, layer.groups]
    found: Tensor = _Conv.apply(*given, *settings)  # type: ignore[no-untyped-call]
    return found


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """In the dtype of autocast, as the layer's own product would be."""
    kind = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


class _BothWaysLinear(nn.Linear):
    backward_weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return both_ways_linear(x, self.weight, self.backward_weight, self.bias)


class _BothWaysConv1d(nn.Conv1d):
    backward_weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return both_ways_conv(self, x, self.weight, self.backward_weight)


class _BothWaysConv2d(nn.Conv2d):
    backward_weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return both_ways_conv(self, x, self.weight, self.backward_weight)


class _BothWaysConv3d(nn.Conv3d):
    backward_weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return both_ways_conv(self, x, self.weight, self.backward_weight)


_KINDS: dict[type, type] = {
    nn.Linear: _BothWaysLinear,
    nn.Conv1d: _BothWaysConv1d,
    nn.Conv2d: _BothWaysConv2d,
    nn.Conv3d: _BothWaysConv3d,
}
_PLAIN = {kind: plain for plain, kind in _KINDS.items()}


@dataclass(frozen=True, kw_only=True)
class BDWP(SRSTE):
    """Train with N:M weights in both products that read them.

    The multiplications are counted, not saved: the layers compute with zeros in dense matrices.

    Args:
        decay: lambda.
        backward: how E_b is chosen: "magnitude", "nested" or "random".
    """

    pattern: str | Pattern = "2:8"
    backward: Literal["magnitude", "nested", "random"] = "magnitude"

    info: ClassVar[MethodInfo] = MethodInfo(
        name="bdwp",
        title="Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow "
        "Co-Design",
        authors="Fang et al.",
        year=2023,
        card="067",
        room="weights",
        kind="hooked",
        needs=("training",),
        pattern="2:8 (any N:M)",
        budget="that of N:M",
        tensors="linear layers and convolutions whose inputs and outputs M divides",
        cost="two selections per tensor every step; a second copy of the weights",
        summary="N:M weights in the forward and, along the other axis, in the backward product",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backward not in ("magnitude", "nested", "random"):
            raise InvalidArgument(
                f"bdwp: backward={self.backward!r}; use 'magnitude', 'nested' or 'random'"
            )

    def why_not(self, view: View, pattern: Pattern) -> str:
        if not isinstance(pattern, NM):
            raise InvalidArgument(f"bdwp needs an N:M pattern, not {pattern}")
        module: Any = view.module
        if type(module) not in _KINDS:
            return f"{type(module).__name__}: not a plain linear layer or convolution"
        if isinstance(getattr(module, "padding", None), str):
            return f"padding={module.padding!r}; give numbers"
        outputs = view.parameter.shape[0] // getattr(module, "groups", 1)
        if outputs % pattern.m:
            return f"pattern {pattern} needs the outputs to be a multiple of {pattern.m} too, " \
                f"not {outputs}"  # fmt: skip
        return super().why_not(view, pattern)

    def begin(self, run: StraightThroughRun) -> None:
        if any(is_sharded(p) for p in run.parameters.values()):
            raise InvalidArgument("bdwp: sharded weights (FSDP) hold no whole groups of outputs")
        super().begin(run)
        for view in run.views.values():
            view.module.register_buffer(
                "backward_weight", view.parameter.detach().clone(), persistent=False
            )
            view.module.__class__ = _KINDS[type(view.module)]

    def used(self, run: StraightThroughRun, name: str, weight: Tensor, mask: Tensor) -> None:
        back = run.views[name].module.get_buffer("backward_weight")
        back.copy_(weight)
        keep_only(self.backward_mask(run, name, weight, mask), back)
        super().used(run, name, weight, mask)

    def backward_mask(
        self, run: StraightThroughRun, name: str, weight: Tensor, mask: Tensor
    ) -> Tensor:
        """E_b of theta, of its shape: n of every m consecutive outputs."""
        scores = weight.abs()
        if self.backward == "nested":
            keep_only(mask, scores)
        elif self.backward == "random":
            generator = generator_for(run.seed, name, run.step)
            scores = torch.rand(weight.shape, generator=generator).to(weight.device)
        assert isinstance(run.pattern, NM)
        groups = scores.float().reshape(len(scores) // run.pattern.m, run.pattern.m, -1)
        chosen = run.pattern.select_columns(groups.transpose(0, 1))
        return chosen.transpose(0, 1).reshape(weight.shape)

    def leave(self, run: StraightThroughRun) -> None:
        for view in run.views.values():
            if type(view.module) in _PLAIN:
                view.module.__class__ = _PLAIN[type(view.module)]
                del view.module.backward_weight


def mac_share(run: StraightThroughRun) -> float:
    """Multiplications of a training step in the masked layers, as a share of dense training.

    (forward + backward + weight gradient) / 3, counted in the masks: 2 n/m + 1 of 3.
    """
    method = run.method
    assert isinstance(method, BDWP)
    spent = total = 0
    for name, mask in run.masks.items():
        back = method.backward_mask(run, name, run.weight(name), mask)
        spent += int(mask.sum()) + int(back.sum()) + mask.numel()
        total += 3 * mask.numel()
    return spent / max(1, total)
