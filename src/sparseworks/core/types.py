"""The shapes of the public results and of the values that methods exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sparseworks.core.masks import Masks

__all__ = ["Progress", "PruneResult", "TensorResult", "dense_lines"]

Progress = Callable[[int, int, str], None]
"""Told of long work: how much is done, of how much, and what."""

_NAMED = 8  # tensors of one reason that get a line each


def dense_lines(skipped: Mapping[str, str], what: str = "left dense") -> list[str]:
    """Lines of text that say what is left dense; where many have one reason, it is said once."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        if len(names) > _NAMED:
            names = [f"{', '.join(names[:3])} and {len(names) - 3} more"]
        lines += [f"  {name}: {what}, {reason}" for name in names]
    return lines


@dataclass(frozen=True)
class TensorResult:
    """What was done to one tensor.

    Args:
        name: parameter name.
        shape: of the parameter.
        pattern: its pattern.
        kept: weights kept.
        total: weights in all.
        error: relative output error ||(W - W') X||^2 / ||W X||^2 on the calibration inputs, where
            the method's evidence allows it (diagonal of the Hessian or all of it), else None.
        seconds: time spent on this tensor.
        note: anything out of the ordinary.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    kept: int
    total: int
    error: float | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def sparsity(self) -> float:
        return 1.0 - self.kept / max(1, self.total)


@dataclass(frozen=True)
class PruneResult:
    """What a call of `prune` did, per tensor.

    Args:
        method: registered name.
        options: everything needed to repeat the call.
        tensors: one entry per pruned tensor.
        skipped: tensor name -> why it was left dense.
        masks: the record now attached to the model.
        model: the pruned model (the one given, unless `copy=True`).
        shortfall: weights that the patterns could not keep although the sparsity allows them.
        seconds: in all.
        warnings: things the user should know (an expert that no token reached, ...).
        changes: numbers in modules that followed where the method cut shapes too; such a model is
            saved with `structured.save_slim`.
    """

    method: str
    options: Mapping[str, Any]
    tensors: tuple[TensorResult, ...]
    skipped: Mapping[str, str]
    masks: Masks
    model: Any = field(repr=False, compare=False)
    shortfall: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    changes: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the pruned tensors."""
        total = sum(t.total for t in self.tensors)
        return 1.0 - sum(t.kept for t in self.tensors) / max(1, total)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON (masks and model are left out)."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "sparsity": self.sparsity,
            "shortfall": self.shortfall,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "skipped": dict(self.skipped),
            "tensors": [{**asdict(t), "sparsity": t.sparsity} for t in self.tensors],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.method}: sparsity {self.sparsity:.4f} over {len(self.tensors)} tensors "
            f"in {self.seconds:.1f} s"
        ]
        width = max((len(t.name) for t in self.tensors), default=0)
        for t in self.tensors:
            error = "" if t.error is None else f"  error {t.error:.4f}"
            note = f"  ({t.note})" if t.note else ""
            lines.append(f"  {t.name:<{width}}  {t.pattern:<12}  {t.sparsity:.4f}{error}{note}")
        lines += dense_lines(self.skipped)
        lines += [f"  warning: {w}" for w in self.warnings]
        return "\n".join(lines)
