"""Inputs of a linear layer that count for a token: the others are taken as 0.

y = W (x * m) + b, m_i = 1 where |x_i| w_i > threshold and i is among the `keep` largest of them.
Where columns of W lie one by one in memory, those of other inputs need not be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument

__all__ = ["ActiveInputs", "Gate", "InputGate", "RuledGate", "attached", "gates", "input_rule",
           "without_gates"]  # fmt: skip


@dataclass(frozen=True, eq=False)
class ActiveInputs:
    """Which inputs count.

    Args:
        threshold: of |x_i| w_i, which must be larger; below 0: none.
        keep: how many count at most for each token, the first ones where several are alike;
            0: all above the threshold.
        weight: w `[inputs]`, fp32, not negative; None: 1.
        share: of the inputs that is expected to count, for choosing layouts.

    Raises:
        InvalidArgument: a weight that is no such vector, or a negative `keep`.
    """

    threshold: float = -1.0
    keep: int = 0
    weight: Tensor | None = None
    share: float = 0.5

    def __post_init__(self) -> None:
        w = self.weight
        if w is not None and (w.ndim != 1 or w.dtype != torch.float32 or bool((w < 0).any())):
            raise InvalidArgument("weight: fp32 [inputs], not negative")
        if self.keep < 0:
            raise InvalidArgument(f"keep={self.keep} is negative")

    def score(self, x: Tensor) -> Tensor:
        """|x| w, fp32 `[..., inputs]`."""
        size = x.detach().float().abs()
        return size if self.weight is None else size * self.weight.to(size.device)

    def mask(self, x: Tensor) -> Tensor:
        """Bool `[..., inputs]`."""
        score = self.score(x)
        if self.threshold >= 0:
            mask = score > self.threshold
        else:
            mask = torch.ones_like(score, dtype=torch.bool)
        if self.keep == 0 or self.keep >= score.shape[-1]:
            return mask
        least = score.topk(self.keep, -1).values[..., -1:]
        above, same = score > least, score == least
        room = self.keep - above.sum(-1, keepdim=True)
        return mask & (above | (same & (same.cumsum(-1) <= room)))

    def same(self, other: ActiveInputs | None) -> bool:
        """Whether both let the same inputs through."""
        if other is None or (self.threshold, self.keep) != (other.threshold, other.keep):
            return False
        a, b = self.weight, other.weight
        if a is None or b is None:
            return a is b
        return torch.equal(a, b)


class Gate:
    """A hook by which activations become sparse, and what it let through.

    Attributes:
        passed, seen: entries so far.
    """

    def __init__(self) -> None:
        self.passed = 0
        self.seen = 0

    def count(self, mask: Tensor) -> None:
        self.passed += int(mask.count_nonzero())
        self.seen += mask.numel()

    def attach(self, module: nn.Module) -> list[Any]:
        """Handles that undo it."""
        raise NotImplementedError

    def parameters(self) -> Iterator[nn.Parameter]:
        """What it learns."""
        return iter(())

    def penalty(self) -> Tensor | None:
        """What its last use adds to a loss."""
        return None


class RuledGate(Gate):
    """A gate on what a linear layer reads.

    Attributes:
        rule: which entries count.
    """

    def __init__(self, rule: ActiveInputs) -> None:
        super().__init__()
        self.rule = rule

    def attach(self, module: nn.Module) -> list[Any]:
        return [module.register_forward_pre_hook(self)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with zeros for what does not count."""
        raise NotImplementedError


class InputGate(RuledGate):
    """Sets the inputs of a linear layer that do not count to 0."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        mask = self.rule.mask(args[0])
        self.count(mask)
        return (args[0] * mask, *args[1:])


def gates(module: nn.Module) -> Iterator[Gate]:
    """Of one module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in list(hooks.values()):
            if isinstance(hook, Gate):
                yield hook


@contextmanager
def attached(pairs: Iterable[tuple[nn.Module, Gate]]) -> Iterator[None]:
    """Modules with gates, for a while."""
    handles: list[Any] = []
    try:
        for module, gate in pairs:
            handles += gate.attach(module)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_gates(model: nn.Module) -> Iterator[None]:
    """The model as it is without gates, for a while."""
    held = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if any(_gate_of(hook) is not None for hook in hooks.values()):
                held.append((hooks, dict(hooks)))
                for key in [k for k, hook in hooks.items() if _gate_of(hook) is not None]:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.clear()
            hooks.update(before)


def _gate_of(hook: Any) -> Gate | None:
    """The gate that a hook is, or is a method of."""
    owner = getattr(hook, "__self__", hook)
    return owner if isinstance(owner, Gate) else None


def input_rule(module: nn.Module) -> ActiveInputs | None:
    """Of a linear layer whose only gate is an `InputGate`, or None where it has none.

    Raises:
        InvalidArgument: other gates.
    """
    found = list(gates(module))
    if not found:
        return None
    if len(found) > 1 or type(found[0]) is not InputGate:
        raise InvalidArgument(f"{type(found[0]).__name__} is not a rule for inputs alone")
    return found[0].rule
