"""What a call of `slim` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sparseworks.core.types import dense_lines
from sparseworks.weights.structured.backup import Change

__all__ = ["SlimResult", "Width"]


@dataclass(frozen=True)
class Width:
    """One width of the model, before and after.

    Args:
        name: the parameter that makes it, `name axis n`.
        before: groups.
        after: groups that stay.
        per: entries of that axis in each group (64 for heads of 64 channels).
    """

    name: str
    before: int
    after: int
    per: int = 1


@dataclass(frozen=True)
class SlimResult:
    """What was cut.

    Args:
        method: registered name.
        options: everything needed to repeat the call.
        widths: every width that could change.
        shapes: parameter name -> (shape before, shape after), where it changed.
        changes: numbers in modules that follow the shapes.
        config: fields of the Hugging Face config that changed; None where there is no config, or
            where no config describes the widths (`uniform=False`).
        flops: on the example, before and after (2 per multiply-add, products only).
        parameters: before and after.
        latency: seconds on the example in torch, before and after, where it was measured.
        model: the slimmed model.
        seconds: in all.
        blocks: whole blocks that went, in order, each by its name at that time.
        plain: layers whose weight was a function of their parameters, plain ones of it now.
        warnings: things the user should know.
        skipped: parameter name -> why it kept its shape, of those with two or more axes.
        training: what a method that trains has to say of it.
    """

    method: str
    options: Mapping[str, Any]
    widths: tuple[Width, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    changes: tuple[Change, ...]
    config: Mapping[str, Any] | None
    flops: tuple[float, float]
    parameters: tuple[int, int]
    latency: tuple[float, float] | None = None
    model: Any = field(repr=False, compare=False, default=None)
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON (the model is left out)."""
        others = ("model", "widths", "changes")
        plain = {k: v for k, v in vars(self).items() if k not in others}
        plain["widths"] = [asdict(w) for w in self.widths]
        plain["changes"] = [asdict(c) for c in self.changes]
        plain["shapes"] = {n: [list(a), list(b)] for n, (a, b) in self.shapes.items()}
        plain["config"] = None if self.config is None else dict(self.config)
        plain["blocks"], plain["plain"] = list(self.blocks), list(self.plain)
        plain["options"] = dict(self.options)
        plain["skipped"], plain["training"] = dict(self.skipped), dict(self.training)
        return plain

    def __str__(self) -> str:
        (f0, f1), (p0, p1) = self.flops, self.parameters
        lines = [
            f"{self.method}: {f0 / 1e6:.2f} -> {f1 / 1e6:.2f} MFLOP ({f1 / max(f0, 1):.1%}), "
            f"{p0:,} -> {p1:,} parameters ({p1 / max(p0, 1):.1%}) in {self.seconds:.1f} s"
        ]
        if self.latency is not None:
            a, b = self.latency
            lines.append(f"  latency {a * 1e3:.2f} -> {b * 1e3:.2f} ms ({a / b:.2f}x faster)")
        size = max((len(w.name) for w in self.widths), default=0)
        for w in self.widths:
            per = f" of {w.per}" if w.per > 1 else ""
            lines.append(f"  {w.name:<{size}}  {w.before} -> {w.after}{per}")
        if self.config:
            lines.append("  config: " + ", ".join(f"{k}={v}" for k, v in self.config.items()))
        if self.blocks:
            lines.append("  blocks dropped, one after the other: " + ", ".join(self.blocks))
        if self.plain:
            lines.append("  plain now, with the weight computed before: " + ", ".join(self.plain))
        lines += dense_lines(self.skipped, "left whole")
        for name, value in self.training.items():
            if isinstance(value, (int, float)):
                lines.append(f"  {name}: {value:.4g}")
        lines += [f"  warning: {w}" for w in self.warnings]
        return "\n".join(lines)
