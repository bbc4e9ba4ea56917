"""Frames one after the other through layers that see only what changed.

    Y_t = Y_(t-1) + W (Q_t - Q_(t-1)),   Q_(-1) = 0, Y_(-1) = 0, biases outside

equals W Q_t up to rounding, and to the last bit in the first frame after `reset`.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.activations.delta import DeltaGate, multiplications
from sparseworks.activations.running import SparseActivations
from sparseworks.core.errors import InvalidArgument, ModelError

__all__ = ["DeltaStream"]


class _Layer:
    """The state of one layer: what it read and gave, without bias."""

    def __init__(self, name: str, module: nn.Module, gate: DeltaGate) -> None:
        self.name, self.module, self.gate = name, module, gate
        self.cost = multiplications(module)
        self.before: Tensor | None = None
        self.total: Tensor | None = None
        self.counts = [0, 0]

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        q = self.gate.step(x)
        levels = (x / q).round() * q
        if self.before is None:
            change = levels
        else:
            if self.before.shape != levels.shape:
                raise InvalidArgument(
                    f"{self.name}: a frame of {tuple(levels.shape)} after one of "
                    f"{tuple(self.before.shape)}; call reset() between streams"
                )
            change = levels - self.before
        self.before = levels
        self.counts[0] += int(change.count_nonzero())
        self.counts[1] += change.numel()
        return (change, *args[1:])

    def give(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        bias: Any = getattr(module, "bias", None)
        own = output if bias is None else output - self._shaped(bias, output)
        if self.total is None:
            self.total = own
            return output
        self.total = self.total + own
        return self.total if bias is None else self.total + self._shaped(bias, output)

    def _shaped(self, bias: Tensor, output: Tensor) -> Tensor:
        shape = [1] * output.ndim
        shape[1 if self.gate.axis == 1 else -1] = -1
        return bias.view(shape)

    def forget(self) -> None:
        self.before = self.total = None


class DeltaStream:
    """The gates of `sparse_activations(model, "delta")` as a stream: call the model frame by frame.

    with DeltaStream(run) as stream:
        for frame in frames:
            y = model(frame)

    Args:
        run: the gates, which rest until the stream is closed; no gradients are kept.
        every: forget all state after so many frames, which bounds what rounding adds up to; None:
            only at `reset`.

    Attributes:
        frames: since the last reset.
    """

    def __init__(self, run: SparseActivations, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise InvalidArgument(f"every={every} must be at least 1")
        self.model, self.every, self.frames = run.model, every, 0
        self._layers: list[_Layer] = []
        for name, gate in run.gates.items():
            if not isinstance(gate, DeltaGate):
                raise ModelError(f"{run.method}: only gates of method 'delta' make a stream")
            self._layers.append(_Layer(name, self.model.get_submodule(name), gate))
        self._handles: list[Any] = []

    def __enter__(self) -> DeltaStream:
        for layer in self._layers:
            layer.gate.enabled = False
            self._handles += [
                layer.module.register_forward_pre_hook(layer.read),
                layer.module.register_forward_hook(layer.give),
            ]
        self._handles.append(self.model.register_forward_pre_hook(self._begin))
        self._grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        torch.set_grad_enabled(self._grad)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            layer.gate.enabled = True
        self.reset()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self.every is not None and self.frames == self.every:
            self.reset()
        self.frames += 1

    def reset(self) -> None:
        """Forget the past: the next frame is computed whole."""
        self.frames = 0
        for layer in self._layers:
            layer.forget()

    @property
    def share(self) -> float:
        """Multiplications that changes needed, of those of a dense model, over all frames so far,
        the whole ones included."""
        used = sum(layer.counts[0] * layer.cost for layer in self._layers)
        return used / max(1.0, sum(layer.counts[1] * layer.cost for layer in self._layers))

    @property
    def state_bytes(self) -> int:
        """Memory of the state."""
        held = [t for x in self._layers for t in (x.before, x.total) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)
