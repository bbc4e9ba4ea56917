"""What a training is made from: the plan (how long, how fast) and the sparse method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import check_sparsity, parse_pattern, resolve_sparsity
from sparseworks.core.schedules import interval
from sparseworks.training.fitting import Recipe
from sparseworks.training.hooked import Hooked, Run
from sparseworks.training.optimizing import registered
from sparseworks.training.sparsify import sparsify
from sparseworks.training.transforming import Transform, Transformed, transform

__all__ = ["HALVES", "Plan", "Sparse"]

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_COMMON = ("pattern", "budget", "include", "exclude", "seed")


@dataclass(frozen=True)
class Plan(Recipe):
    """How a model is trained.

    Args:
        optimizer: SGD with Nesterov momentum, AdamW, or a registered one.
        optimizer_options: its fields, of a registered one.
        warmup: fraction of the training in which the learning rate rises to `lr`; then it falls
            on a cosine.
        accumulate: batches whose gradients add up to one step.
        clip: largest norm of the gradient.
        amp: compute in "bf16" or "fp16" (with a loss scaler).
        seed: of torch's generators.
    """

    optimizer: str = "sgd"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.3
    accumulate: int = 1
    clip: float | None = None
    amp: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule != "one-cycle":
            raise InvalidArgument(
                f"schedule={self.schedule!r}: a plan rises over `warmup` and falls on a cosine"
            )
        if not 0 < self.warmup < 1:
            raise InvalidArgument(f"warmup={self.warmup} must be between 0 and 1")
        if self.accumulate < 1:
            raise InvalidArgument(f"accumulate={self.accumulate} must be at least 1")
        if self.clip is not None and not self.clip > 0:
            raise InvalidArgument(f"clip={self.clip} must be positive")
        if self.amp is not None and self.amp not in HALVES:
            raise InvalidArgument(f"amp={self.amp!r}: use bf16 or fp16")
        if self.optimizer not in ("sgd", "adamw"):
            registered(self.optimizer, self.optimizer_options)
        elif self.optimizer_options:
            raise InvalidArgument(
                f"optimizer_options {sorted(self.optimizer_options)} are those of a registered "
                f"optimizer, and {self.optimizer} is none"
            )


@dataclass(frozen=True)
class Sparse:
    """What `sparsify` or `transform` is called with, whichever the method is for.

    Args:
        method: a registered method or an object, of kind "hooked" or "transform".
        sparsity: final fraction of zeros.
        settings: the other arguments (pattern, budget, include, exclude, seed, method options).

    Raises:
        InvalidArgument: no such method or option, or one of another kind.
    """

    method: Any
    sparsity: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    chosen: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        own = {k: v for k, v in self.settings.items() if k not in _COMMON}
        chosen = registry.build(self.method, ("hooked", "transform"), **own)
        if isinstance(chosen, Hooked):
            needed = not chosen.starts_from_record
        else:
            needed = chosen.needs_sparsity
        if needed:
            legal = parse_pattern(self.settings.get("pattern") or chosen.pattern)
            resolve_sparsity(legal, self.sparsity, f"method {chosen.info.name!r}")
        elif self.sparsity is not None:
            check_sparsity(self.sparsity)
        object.__setattr__(self, "chosen", chosen)

    def with_defaults(self, **known: Any) -> Sparse:
        """The same with options that the method has and that were not given."""
        if not isinstance(self.method, str):
            return self
        lacking = {
            k: v
            for k, v in known.items()
            if registry.has_option(self.method, k) and k not in self.settings
        }
        return replace(self, settings={**self.settings, **lacking}) if lacking else self

    def check_steps(self, steps: int) -> None:
        """A training of so many steps must reach the first change of the masks.

        Raises:
            InvalidArgument: the method was given a longer `every`.
        """
        every = getattr(self.chosen, "every", None)
        if isinstance(every, int) and every > steps:
            raise InvalidArgument(
                f"the masks would change every {every} steps, but the training has {steps}: leave "
                f"`every` out or set it to {interval(steps)}, say"
            )

    def begin(
        self,
        model: nn.Module,
        steps: int,
        build: Callable[[Any], torch.optim.Optimizer],
    ) -> tuple[Run | Transformed, torch.optim.Optimizer]:
        """The sparse run and the optimizer, made in the order that the method needs."""
        given = {"sparsity": self.sparsity, "steps": steps, **self.settings}
        if isinstance(self.chosen, Transform):
            job = self.transformed(model, steps)
            optimizer = build(job.parameter_groups())
            return job.attach(optimizer), optimizer
        optimizer = build(model.parameters())
        return sparsify(model, optimizer, self.method, **given), optimizer

    def transformed(self, model: nn.Module, steps: int) -> Transformed:
        """The model changed by a method of kind "transform"; it has yet to be attached."""
        return transform(model, self.method, sparsity=self.sparsity, steps=steps, **self.settings)
