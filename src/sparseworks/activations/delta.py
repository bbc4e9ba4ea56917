"""Delta activation layer (Yousefzadeh, Sifalakis 2021, Training for temporal sparsity in deep
neural networks, application in video processing, arXiv:2107.07305): inputs of layers that did not
change between frames cost nothing.

    Q_t = q round(x_t / q),   D_t = Q_t - Q_(t-1),   Y_t = Y_(t-1) + W D_t = W Q_t

with a step q = |theta| > 0 for each channel or layer. Because W is linear the two forms are equal:
training multiplies Q and uses D in the loss, `DeltaStream` multiplies D frame by frame. The
gradient of round is that of its argument, and the q that divides has none, so dQ/dq is the level
round(x/q). The penalty

    sum over layers of strength * n_out * mean |D_t|,   n_out: multiplications of one input,

would shrink q. As in the authors' code, every gradient that reaches q is turned round by default,
that of the task too ("penalty": of the penalty alone; "none": neither). n_out is per layer, so that
it is relative to the largest layer here, which keeps `strength` comparable between models.

Before any training a step can be given, or is the smallest for which the wanted share of D is 0 on
the calibration clips, layer by layer. Every layer quantises its own inputs; biases, norms and
pooling stay outside. In the authors' experiments on UCF101 q started at 3 to 4 of 255.

In our quick setting (claim 116: ResNet-20 on synthetic clips, 80 steps) training lowers the share
of multiplications from 0.30 to 0.27, less than 0.7 of the 0.46 that sparse frames need, at 83 %
accuracy as without a penalty; five seeds leave the other margins of the paper open. With a panning
camera it is 0.36.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseworks.activations.calibrating import Job
from sparseworks.activations.method import ActivationMethod
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.models.active import Gate
from sparseworks.training.fake_quantization import rounded

__all__ = ["Delta", "DeltaGate", "multiplications", "quantized"]

Reverse = Literal["all", "penalty", "none"]
_LEAST = 1e-6  # of a step


def quantized(x: Tensor, q: Tensor) -> Tensor:
    """q round(x / q); dQ/dx = 1 and dQ/dq = round(x / q). q is broadcast to x."""
    step = q.detach()
    level = rounded(x / step)
    return step * level + level.detach() * (q - step)  # the last is 0, for the gradient of q


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


def _clips(x: Tensor, frames: int) -> Tensor:
    """`[clips * frames, ...]` as `[clips, frames, ...]`."""
    return x.reshape(-1, frames, *x.shape[1:])


def multiplications(module: nn.Module) -> float:
    """n_out: of one input, on average; borders count as the inside."""
    weight: Any = module.weight
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return float(weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1])
    steps = 1
    for s in module.stride:
        steps *= s
    return float(weight[:, 0].numel() / module.groups / steps)


class DeltaGate(Gate):
    """Quantises what a layer reads, and says how much of it changed.

    Args:
        theta: steps, `[channels]` or `[1]`.
        frames: of a clip; the first axis of inputs is clips x frames.
        weight: of this layer in the penalty.
        reverse: which gradients of the step are turned round.

    Attributes:
        passed, seen: changes that are not 0, and all, of frames after the first of their clips.
        first_passed, first_seen: entries of first frames.
    """

    def __init__(
        self, theta: Tensor, frames: int, weight: float = 1.0, reverse: Reverse = "all"
    ) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.detach().clone())
        self.frames, self.weight, self.reverse = frames, weight, reverse
        self.first_passed = self.first_seen = 0
        self.change: Tensor | None = None
        self.enabled = True

    def attach(self, module: nn.Module) -> list[Any]:
        self.axis = 1 if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else -1
        return [module.register_forward_pre_hook(self)]

    def parameters(self) -> Iterator[nn.Parameter]:
        yield self.theta

    def step(self, x: Tensor) -> Tensor:
        """q, in the shape that x broadcasts with."""
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return self.theta.abs().clamp_min(_LEAST).view(shape).to(x.dtype)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.enabled:
            return args
        x = args[0]
        if len(x) % self.frames:
            raise InvalidArgument(
                f"{len(x)} inputs are no whole clips of frames={self.frames}; give clips one after "
                "the other, or look at single frames in a DeltaStream"
            )
        q = self.step(x)
        turned: Tensor = _Reversed.apply(q)  # type: ignore[no-untyped-call]
        levels = quantized(x, turned if self.reverse == "all" else q)
        judged = quantized(x, turned) if self.reverse == "penalty" else levels
        clips = _clips(judged, self.frames)
        change = clips[:, 1:] - clips[:, :-1]
        self.change = change.abs().mean() if self.frames > 1 else None
        self.count(change)
        self.first_passed += int(clips[:, 0].count_nonzero())
        self.first_seen += clips[:, 0].numel()
        return (levels, *args[1:])

    def penalty(self) -> Tensor | None:
        return None if self.change is None else self.weight * self.change


@dataclass(frozen=True)
class Delta(ActivationMethod):
    """Quantised inputs whose changes between frames are what counts.

    Args:
        frames: of a clip; inputs are clips x frames, one clip after the other.
        step: the first q; None: the smallest that leaves the wanted share of changes 0 on the first
            calibration batch.
        strength: factor of the penalty.
        per: a step for each "channel" or "layer".
        reverse: gradients of steps that are turned round: "all", of the "penalty", or "none".
    """

    frames: int = 2
    step: float | None = None
    strength: float = 1.0
    per: Literal["channel", "layer"] = "channel"
    reverse: Reverse = "all"

    layouts: ClassVar[tuple[str, ...]] = ("linear", "transposed", "conv")
    info: ClassVar[MethodInfo] = MethodInfo(
        name="delta",
        title="Training for temporal sparsity in deep neural networks, application in video "
        "processing",
        authors="Yousefzadeh et al.",
        year=2021,
        card="116",
        room="activations",
        kind="activation",
        needs=("data",),
        pattern="changes between frames",
        tensors="inputs of linear layers and convolutions",
        cost="one pass over a calibration batch; training with a penalty pays",
        summary="inputs are quantised, and count where they change from frame to frame",
    )

    def __post_init__(self) -> None:
        if self.frames < 1 or self.strength < 0 or (self.step is not None and self.step <= 0):
            raise InvalidArgument("frames from 1, strength from 0, step above 0 or None")
        if self.per not in ("channel", "layer") or self.reverse not in ("all", "penalty", "none"):
            raise InvalidArgument("per: channel or layer; reverse: all, penalty or none")

    def gates(self, job: Job) -> dict[str, Gate]:
        costs = {v.module_name: multiplications(v.module) for v in job.views}
        largest = max(costs.values())
        steps: dict[str, tuple[int, float]] = {}

        def look(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0]
                if name not in steps:
                    conv = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
                    channels = x.shape[1 if conv else -1] if self.per == "channel" else 1
                    steps[name] = channels, self.step or self._smallest(x, job.sparsity)

            return hook

        job.watch({n: look(n) for n in costs}, {}, job.batches[:1])
        found: dict[str, Gate] = {}
        for name, (channels, step) in steps.items():
            weight = self.strength * costs[name] / largest
            found[name] = DeltaGate(
                torch.full((channels,), step), self.frames, weight, self.reverse
            )
        return found

    def _smallest(self, x: Tensor, sparsity: float) -> float:
        """The smallest step that leaves this share of changes 0, to a thousandth of its size."""
        if self.frames < 2 or len(x) % self.frames:
            raise InvalidArgument(
                f"{len(x)} calibration inputs with frames={self.frames}: whole clips of at least "
                "two are needed, or step="
            )
        clips = _clips(x.detach().float(), self.frames)
        low, high = _LEAST, max(2.1 * float(clips.abs().max()), 2 * _LEAST)
        while high > 1.001 * low:
            middle = (low * high) ** 0.5
            levels = (clips / middle).round()
            still = float((levels[:, 1:] == levels[:, :-1]).double().mean())
            low, high = (low, middle) if still >= sparsity else (middle, high)
        return high
