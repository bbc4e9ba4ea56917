"""What `sparseworks compare` makes of a model: one method, or several one after the other.

wanda                       every sparsity of --sparsities
rounding:group=16           options of the method follow a colon; every width of --bits
group-norm                  every share of --flops
wanda:pattern=2:4+rounding  pruned to 2:4, then quantized; an amount that is told is not swept
group-norm+wanda+rounding   slimmed, pruned and quantized
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.kinds import Kind
from sparseworks.core.patterns import check_sparsity, parse_pattern

__all__ = ["Recipe", "Stage", "parse_amount", "parse_recipe"]

_KINDS: dict[str, tuple[Kind, ...]] = {
    "slimming": ("structured", "whole-model"),
    "pruning": ("one-shot", "staged"),
    "quantization": ("quantization",),
}
_OF_CALL = {  # options of the call, beside those of the method
    "slimming": ("flops", "params", "floor", "iterations", "streams", "blocks"),
    "pruning": ("sparsity", "pattern", "budget", "recovery", "rounds"),
    "quantization": (),
}
_MASKED = ("any", "that of the model's masks")  # patterns of methods that take masked models


@dataclass(frozen=True)
class Stage:
    """One method of a recipe.

    Args:
        family: slimming, pruning or quantization.
        name: of the method.
        call: options of the call.
        options: of the method.
    """

    family: str
    name: str
    call: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def swept(self) -> str | None:
        """What the sweep tells: flops, sparsity or bits; None where the recipe tells it."""
        told = {**self.call, **self.options}
        if self.family == "slimming":
            return None if {"flops", "params"} & set(told) else "flops"
        if self.family == "quantization":
            known = registry.has_option(self.name, "bits")
            return "bits" if known and "bits" not in told else None
        return None if "sparsity" in told or self._fixed else "sparsity"

    @property
    def _fixed(self) -> bool:
        """Does the pattern tell the sparsity?"""
        pattern = self.call.get("pattern", getattr(self._built(), "pattern", None))
        return pattern is not None and parse_pattern(pattern).fixed_density is not None

    def _built(self, **more: Any) -> Any:
        return registry.build(self.name, _KINDS[self.family], **{**self.options, **more})

    def check(self, amounts: Sequence[Any]) -> None:
        """Refuse options, and amounts of its sweep, that the method does not take."""
        self._built()
        for amount in amounts if self.swept else ():
            if self.swept == "bits":
                self._built(bits=amount)
            if self.swept == "sparsity" and ":" in amount and "pattern" in self.call:
                raise InvalidArgument(
                    f"{self.name}:pattern={self.call['pattern']} has a pattern: "
                    f"--sparsities {amount} is another"
                )


@dataclass(frozen=True)
class Recipe:
    """Methods that are applied one after the other.

    Args:
        text: as the user wrote it.
        stages: in order.
    """

    text: str
    stages: tuple[Stage, ...]

    @property
    def family(self) -> str:
        """Of its stages: "pruning + quantization"."""
        return " + ".join(s.family for s in self.stages)

    def check(self, swept: Mapping[str, Sequence[Any]]) -> None:
        """Refuse what its methods do not take.

        Args:
            swept: "sparsity", "flops" and "bits" -> amounts.
        """
        for stage in self.stages:
            stage.check(swept.get(stage.swept or "", ()))
            if stage.swept and not swept[stage.swept]:
                option = {"sparsity": "sparsities"}.get(stage.swept, stage.swept)
                raise InvalidArgument(f"{self.text}: give --{option}, or {stage.name}:"
                                      f"{stage.swept}=...")  # fmt: skip

    def amounts(self, swept: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """Every choice of what is swept: {"sparsity": "0.5", "bits": 4}."""
        names = [s.swept for s in self.stages if s.swept]
        return [
            dict(zip(names, chosen)) for chosen in itertools.product(*(swept[n] for n in names))
        ]

    def amount(self, amounts: Mapping[str, Any]) -> str:
        """One word or more for people: "0.5 bits=4"."""
        words = [v if n == "sparsity" else f"{n}={v:g}" for n, v in amounts.items()]
        return " ".join(words)

    def line(self, amounts: Mapping[str, Any]) -> str:
        """Of points that differ in nothing but the first number that is swept; "": of none."""
        first = next(iter(amounts), None)
        if first is None or ":" in str(amounts[first]):
            return ""
        rest = self.amount({n: v for n, v in amounts.items() if n != first})
        return f"{self.text} {rest}".strip() + " by " + first

    def file_name(self, amounts: Mapping[str, Any]) -> str:
        """For files: letters, digits and a few signs."""
        words = re.sub(r"(\d):(\d)", r"\1of\2", f"{self.text} {self.amount(amounts)}".strip())
        return re.sub(r"[^\w.+=-]+", "-", words)


def parse_recipe(text: str) -> Recipe:
    """A recipe from its text.

    Raises:
        InvalidArgument: an unknown method or option, a kind that cannot be compared, or an order
            that makes no sense.
    """
    stages = tuple(_stage(part, text) for part in text.split("+"))
    order = [list(_KINDS).index(s.family) for s in stages]
    if order != sorted(set(order)):
        raise InvalidArgument(
            f"{text!r}: at most one method each slims, prunes and quantizes, in this order "
            f"({' + '.join(s.name for s in stages)}: {', '.join(s.family for s in stages)})"
        )
    pattern = registry.resolve(stages[-1].name).info.pattern
    pruned = any(s.family == "pruning" for s in stages[:-1])
    if pruned and stages[-1].family == "quantization" and pattern not in _MASKED:
        raise InvalidArgument(
            f"{text!r}: {stages[-1].name} prunes by itself ({pattern}): give it without "
            f"{stages[-2].name}"
        )
    return Recipe(text, stages)


def _stage(part: str, text: str) -> Stage:
    name, _, told = part.partition(":")
    if not name:
        raise InvalidArgument(f"{text!r}: methods joined by + (wanda+rounding), none of them empty")
    kinds = tuple(kind for kinds in _KINDS.values() for kind in kinds)
    cls = registry.resolve(name)
    if cls.info.kind not in kinds:
        registry.build(name, kinds)  # says which command runs it
    family = next(f for f, kinds in _KINDS.items() if cls.info.kind in kinds)
    options: dict[str, Any] = {}
    for pair in filter(None, told.split(",")):
        option, equals, value = pair.partition("=")
        if not equals or not option.isidentifier():
            raise InvalidArgument(f"{text!r}: options as {name}:option=value,..., not {pair!r}")
        options[option] = value if option == "pattern" else _value(value)
    call = {k: v for k, v in options.items() if k in _OF_CALL[family]}
    stage = Stage(family, name, call, {k: v for k, v in options.items() if k not in call})
    if "pattern" in call:
        parse_pattern(call["pattern"])
    if "sparsity" in call:
        check_sparsity(call["sparsity"])
    registry.build(name, **stage.options)
    return stage


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_amount(text: str) -> dict[str, Any]:
    """`{"sparsity": 0.5}` or `{"pattern": "2:4"}` from one word."""
    if ":" in text:
        parse_pattern(text)
        return {"pattern": text}
    try:
        value = float(text)
    except ValueError:
        raise InvalidArgument(
            f"--sparsities {text!r}: a fraction in [0, 1) or an N:M pattern"
        ) from None
    return {"sparsity": check_sparsity(value)}
