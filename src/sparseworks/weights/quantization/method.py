"""What a quantization method is, what it is given, and what a call of `quantize` did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.core.masks import masks
from sparseworks.core.registry import MethodInfo
from sparseworks.core.types import Progress, dense_lines
from sparseworks.kernels.grids import Grid, round_groups
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.quantized import Grids, Quantized
from sparseworks.models.views import View

__all__ = ["Quantization", "QuantizeResult", "QuantizedTensor", "Work"]


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized weight.

    Args:
        name: parameter name.
        shape: of the parameter.
        bits: of a code.
        group: columns that share a scale.
        kept: weights of groups that are kept and, where the model has a mask, kept by that.
        total: weights in all.
        nbytes: codes, scales, zeros, and a bit a group where some are pruned.
        error: ||W - W_q||^2 / ||W||^2 against the weights before the call.
        pattern: of its zeros.
        note: what else the method has to say.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    group: int
    kept: int
    total: int
    nbytes: int
    error: float
    pattern: str = "dense"
    note: str = ""

    @property
    def sparsity(self) -> float:
        return 1.0 - self.kept / max(1, self.total)


@dataclass(frozen=True)
class QuantizeResult:
    """What a call of `quantize` did.

    Args:
        method: registered name.
        options: everything needed to repeat the call.
        tensors: one entry per quantized tensor.
        skipped: tensor name -> why it was left as it is.
        grids: the record now attached to the model.
        model: the quantized model.
        seconds: in all.
        warnings: things the user should know.
        figures: what the method has to say, in JSON values.
    """

    method: str
    options: Mapping[str, Any]
    tensors: tuple[QuantizedTensor, ...]
    skipped: Mapping[str, str]
    grids: Grids
    model: Any = field(repr=False, compare=False)
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros that are not stored, or masked, over the quantized tensors."""
        return 1.0 - sum(t.kept for t in self.tensors) / sum(t.total for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Scales, zeros and flags included."""
        return self.grids.bits_per_weight

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "sparsity": self.sparsity,
            "bits_per_weight": self.bits_per_weight,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "skipped": dict(self.skipped),
            "figures": dict(self.figures),
            "tensors": [{**asdict(t), "sparsity": t.sparsity} for t in self.tensors],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {self.bits_per_weight:.3f} bits a weight, sparsity "
            f"{self.sparsity:.4f} over {len(self.tensors)} tensors in {self.seconds:.1f} s"
        ]
        width = max((len(t.name) for t in self.tensors), default=0)
        for t in self.tensors:
            note = f"  ({t.note})" if t.note else ""
            lines.append(
                f"  {t.name:<{width}}  {t.bits} bit in groups of {t.group}  sparsity "
                f"{t.sparsity:.4f}  error {t.error:.5f}{note}"
            )
        lines += dense_lines(self.skipped, "left as it is")
        lines += [f"  warning: {w}" for w in self.warnings]
        return "\n".join(lines)


@dataclass
class Work:
    """One call of `quantize`, as a method sees it.

    Args:
        model: to change.
        views: its weights.
        batches: of calibration; None: none were given.
        loss: `(model, batch) -> scalar`; cross-entropy when None.
        seed: for what is drawn at random.
        progress: called with (done, total, what).
    """

    model: nn.Module
    views: Sequence[View]
    batches: Sequence[Batch] | None
    loss: Loss | None
    seed: int
    progress: Progress | None
    skipped: dict[str, str] = field(default_factory=dict)
    entries: dict[str, Quantized] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def fitting(self, group: int | None) -> list[View]:
        """The weights of whole groups; the others are skipped, each with the reason.

        Raises:
            ModelError: there are none.
        """
        found = []
        for view in self.views:
            if group is not None and view.shape[1] % group:
                reason = f"its {view.shape[1]} columns are no multiple of the group of {group}"
                self.skipped[view.name] = reason
            else:
                found.append(view)
        if not found:
            raise ModelError(f"no weight has whole groups of {group} columns; take a smaller group")
        return found

    @torch.no_grad()
    def rounded(self, view: View, bits: int, group: int | None, zeros: bool) -> Quantized:
        """A weight rounded to the nearest in groups (None: whole rows), under its mask."""
        weight = view.matrix().float().cpu()
        width = weight.shape[1] if group is None else group
        kept = self.kept(view)
        grid: Grid = round_groups(torch.where(kept, weight, 0.0), kept, width, bits, zeros=zeros)
        live = kept.view(kept.shape[0], -1, width).any(2)
        return Quantized.of(view, grid, bits, live)

    def kept(self, view: View) -> Tensor:
        """The mask of a weight as a matrix on the CPU; all True without one."""
        record = masks(self.model)
        if record is None or view.name not in record:
            return torch.ones(view.shape, dtype=torch.bool)
        return view.matrix(record[view.name])

    def put(self, view: View, entry: Quantized, note: str = "") -> None:
        """Write the integers' weights into the model and remember them."""
        with torch.no_grad():
            view.parameter.copy_(entry.weight())
        self.entries[view.name] = entry
        if note:
            self.notes[view.name] = note

    def tell(self, done: int, total: int, what: str) -> None:
        if self.progress is not None:
            self.progress(done, total, what)


@dataclass(frozen=True, kw_only=True)
class Quantization(ABC):
    """Base of methods of kind "quantization"; subclasses are frozen dataclasses of options."""

    info: ClassVar[MethodInfo]

    @abstractmethod
    def run(self, work: Work) -> None:
        """Quantize `work.views` through `work.put`; what fails midway is undone by the caller."""
