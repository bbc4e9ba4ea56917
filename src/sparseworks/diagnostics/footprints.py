"""What a model takes: its zeros, bytes in a file, operations a call, and time.

All are measured on the model as it is, in the same way for pruned, slimmed and quantized ones:

    sparsity   1 - (weights that are not 0) / (weights of the dense model), over what is prunable;
               weights that were cut away count as zeros
    bytes      of the file that `sparseworks.save` writes
    flops      2 sum_p density(p) f(p) + 2 f_other, multiply-adds f of one sample (`models.costs`)
    latency    median over calls of the compiled model, in turn with the dense model in torch
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparseworks.diagnostics.turns import in_turn
from sparseworks.engine import compile
from sparseworks.io import save
from sparseworks.models.calls import Arguments, Example, batch_size, call
from sparseworks.models.costs import multiply_adds
from sparseworks.models.modes import evaluating
from sparseworks.models.views import Prunable, find_prunable

__all__ = ["Yardstick"]


@dataclass(frozen=True)
class Yardstick:
    """Measures models beside the dense one that they were made from.

    Args:
        dense: not to be changed meanwhile.
        example: what models are called with; None: neither operations nor time are measured.
        include: name patterns of the only weights that count for the sparsity.
        exclude: name patterns of weights that do not count.
        repeat: calls that are timed, at least; 0: no time is measured.
    """

    dense: nn.Module
    example: Example | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    repeat: int = 0

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Sparsity, bytes, flops, and latency_ms, torch_ms, speedup and runs_as, where measured."""
        weights = sum(v.parameter.numel() for v in self.prunable(self.dense))
        left = sum(int(v.parameter.count_nonzero()) for v in self.prunable(model))
        with tempfile.TemporaryDirectory() as place:
            written = save(model, Path(place) / "model.safetensors").file_bytes
        found: dict[str, Any] = {"sparsity": 1 - left / weights, "bytes": written}
        if self.example is not None:
            found["flops"] = self._flops(model, Arguments.of(self.example))
            if self.repeat:
                found |= self._times(model, Arguments.of(self.example))
        return found

    def prunable(self, model: nn.Module) -> Prunable:
        """The weights of a model that count for its sparsity."""
        return find_prunable(model, self.include or None, self.exclude or None)

    def _flops(self, model: nn.Module, example: Arguments) -> float:
        densities = {
            n: int(p.count_nonzero()) / max(1, p.numel()) for n, p in model.named_parameters()
        }
        cost = multiply_adds(model, example).sparse(densities)
        return 2 * cost / batch_size(example)

    def _times(self, model: nn.Module, example: Arguments) -> dict[str, Any]:
        compiled = compile(model, example)
        with evaluating(self.dense):
            times = in_turn(
                {
                    "compiled": lambda: compiled(*example.args, **example.kwargs),
                    "torch": lambda: call(self.dense, example),
                },
                self.repeat,
            )
        fast, slow = (statistics.median(times[who]) for who in ("compiled", "torch"))
        return {
            "latency_ms": fast, "torch_ms": slow, "speedup": slow / fast, "runs_as": compiled.kind,
        }  # fmt: skip
