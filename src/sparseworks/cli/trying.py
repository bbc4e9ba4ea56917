"""What `sparseworks recipe` does for every model that it tries: made, compiled, measured."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseworks.core.errors import InvalidArgument, SparseworksError
from sparseworks.diagnostics.goals import Rung, shares

__all__ = ["Trial"]


class Trial(ABC):
    """A model and what is measured of those made from it.

    Args:
        options: of the command.
        loaded: the dense model.

    Attributes:
        dtypes: to compute in, exact ones first.
        rows: a row for every model that was tried.
    """

    usual: tuple[str, ...]

    def __init__(self, options: Any, loaded: Any) -> None:
        from sparseworks.cli.compare import Options as CompareOptions

        self.options, self.loaded = options, loaded
        self.dtypes = self._checked(options.dtypes or self.usual)
        same = ("model", "data", "samples", "length", "batch_size", "metric", "eval_data",
                "eval_samples", "batch", "tokens", "input_shape", "include", "exclude")  # fmt: skip
        self.as_compared = CompareOptions(
            **{name: getattr(options, name) for name in same}, seeds=(options.seed,),
            skip_indivisible=True,
        )  # fmt: skip
        self.rows: dict[Rung, dict[str, Any]] = {}
        self._kept: tuple[Any, Any, Any] = None, None, None  # the last model made, and its result
        self._drawn: dict[Any, Any] = {}
        self.dense: dict[str, Any] = {}

    @property
    def has_data(self) -> bool:
        """Is there something to calibrate on?"""
        return self.loaded.tokenizer is not None or self.options.data is not None

    def __call__(self, rung: Rung) -> Mapping[str, float]:
        """The shares of one model.

        Raises:
            InvalidArgument: the model cannot be made so.
        """
        model, seconds = self.model_of(rung)
        row = {**self.told(rung), "seed": self.options.seed, **self.measured(model, rung.dtype)}
        self.rows[rung] = row | {"seconds": seconds}
        return shares(row, self.dense, self.higher)

    def model_of(self, rung: Rung) -> tuple[Any, float]:
        """The model of a rung before it is compiled, and the seconds that making it took."""
        from sparseworks.cli.recipes import parse_recipe
        from sparseworks.cli.stages import changed

        if not rung.text:
            return self.loaded.model, 0.0
        key = rung.text, rung.amounts
        if self._kept[0] != key:
            self._kept = None, None, None
            recipe, kept = parse_recipe(rung.text), self._drawn.setdefault(rung.text, {})
            amounts, seed = dict(rung.amounts), self.options.seed
            try:
                done = changed(recipe, self.loaded, self.as_compared, amounts, seed, kept)
            except SparseworksError as error:
                raise InvalidArgument(str(error)) from error
            self._kept = key, done[-1][1], sum(result.seconds for _, result in done)
        return self._kept[1].model, self._kept[2]

    def amount(self, rung: Rung) -> str:
        """For people."""
        from sparseworks.cli.recipes import parse_recipe

        words = parse_recipe(rung.text).amount(dict(rung.amounts)) if rung.text else ""
        return f"{words} {rung.dtype}".strip()

    def told(self, rung: Rung) -> dict[str, Any]:
        """What names a model."""
        from sparseworks.cli.recipes import parse_recipe

        family = parse_recipe(rung.text).family if rung.text else "dense"
        return {"method": rung.text or "as it is", "family": family, "amount": self.amount(rung),
                "dtype": rung.dtype}  # fmt: skip

    def about(self) -> dict[str, Any]:
        """The model and its metric."""
        return {"model": self.loaded.name, "metric": self.metric_name, "unit": self.unit,
                "higher_is_better": self.higher, "dense": self.dense["quality"]}  # fmt: skip

    def points(self, tried: Mapping[Rung, Any], best: Rung | None) -> dict[str, Any]:
        """As the page of a comparison takes them: axes, points (the dense model first), rows."""
        from sparseworks.diagnostics.tradeoffs import (
            AXES,
            Axis,
            pareto_front,
            quality_label,
            told_of,
        )

        axes = {a.name: a for a in AXES if a.name in ("latency", "size", "speedup", "flops")
                and (a.column in self.dense or a.name == "speedup")}  # fmt: skip
        label = quality_label(self.metric_name, self.unit)
        axes = {"quality": Axis("quality", "quality", label, self.higher), **axes}
        dense = {"method": "dense in torch", "family": "dense", "amount": "", "seed": 0,
                 "dtype": "fp32", **self.dense, "speedup": 1.0}  # fmt: skip
        rows = [dense, *(self.rows[rung] for rung in tried)]
        points: list[dict[str, Any]] = []
        for rung, row in zip([None, *tried], rows, strict=True):
            points.append({
                **{k: row[k] for k in ("method", "family", "amount")}, "untouched": 0, "seeds": 1,
                "line": "" if rung is None or not rung.text else rung.ladder, "measure": None,
                "make": self._command(rung), "best": rung is not None and rung == best,
                "values": {n: (row[a.column], None, None) for n, a in axes.items()},
            })  # fmt: skip
        pairs = [(p["values"]["latency"][0], p["values"]["quality"][0]) for p in points]
        for on, point, row in zip(
            pareto_front(pairs, (False, self.higher)), points, rows, strict=True
        ):
            point["front"] = on
            row |= {"front": on, "command": point["make"]}
        return {
            "x": "latency",
            "y": "quality",
            "axes": told_of(axes),
            "points": points,
            "rows": rows,
        }

    def _command(self, rung: Rung | None) -> str | None:
        """What makes the model, and compiles it where the command can read what was made."""
        from sparseworks.cli.recipes import parse_recipe
        from sparseworks.cli.reproducing import making

        if rung is None:
            return None
        words = ["sparseworks", "compile", self.options.model, "--dtype", rung.dtype]
        made = None
        if rung.text:
            recipe = parse_recipe(rung.text)
            folder = hasattr(self.loaded.model, "save_pretrained")
            made = making(self.as_compared, recipe, dict(rung.amounts), folder=folder)
            if made is None or "slimming" in recipe.family:
                return made
            out = recipe.file_name(dict(rung.amounts))
            words += ["--weights", f"{out}/{'checkpoint' if folder else 'model.safetensors'}"]
        words += ["--out", "compiled.safetensors"]
        return " && ".join(filter(None, (made, shlex.join(words))))

    def save(self, rung: Rung, out: Path) -> None:
        """The chosen model as a checkpoint, and compiled where that is faster than torch."""
        from sparseworks.io import save
        from sparseworks.weights.structured import save_slim

        model, _ = self.model_of(rung)
        out.mkdir()
        folder = hasattr(model, "config") and hasattr(model, "save_pretrained")
        target = out / ("checkpoint" if folder else "model.safetensors")
        result = self._kept[1] if rung.text else None
        slimmed = "slimming" in self.told(rung)["family"]
        if slimmed and hasattr(result, "changes"):
            save_slim(result, target)
        elif not slimmed:
            save(model, target, tokenizer=self.loaded.tokenizer if folder else None)
        fast = self.compiled(model, rung.dtype)
        if getattr(fast, "kind", "program") == "program":  # others have no plan of their own
            fast.save(out / "compiled.safetensors")

    def _checked(self, dtypes: tuple[str, ...]) -> tuple[str, ...]:
        odd = [d for d in dtypes if d not in self.usual]
        if odd:
            raise InvalidArgument(f"--dtypes {odd[0]}: of this model {', '.join(self.usual)}")
        return tuple(dict.fromkeys(dtypes))

    metric_name: str
    unit: str
    higher: bool

    @abstractmethod
    def measured(self, model: Any, dtype: str) -> dict[str, Any]:
        """quality, latency_ms, speedup, bytes, and where they are counted flops."""

    @abstractmethod
    def compiled(self, model: Any, dtype: str) -> Any:
        """The model as it runs."""
