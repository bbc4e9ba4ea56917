"""What `sparseworks compare` does in every cell: a copy of the model, changed and measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseworks.cli.preparing import one_metric
from sparseworks.core.errors import InvalidArgument

__all__ = ["COLUMNS", "Subject"]

COLUMNS = (
    "method", "family", "amount", "seed", "sparsity", "bytes", "flops", "latency_ms", "torch_ms",
    "speedup", "runs_as", "seconds", "untouched", "front", "command",
)  # fmt: skip
_REPEAT = 24  # calls that are timed


class Subject:
    """A model and its metric.

    Args:
        options: of the command.

    Raises:
        InvalidArgument: nothing tells what the model is called with, and that is needed; or a
            metric with the name of another column.
    """

    def __init__(self, options: Any) -> None:
        from sparseworks.cli.examples import example_of
        from sparseworks.cli.loading import load_model
        from sparseworks.diagnostics.footprints import Yardstick

        self.options = options
        self.loaded = load_model(options.model, options.dtype)
        example = example_of(self.loaded, options)
        if example is None and (options.latency or "flops" in (options.x, options.y)):
            raise InvalidArgument(
                "nothing tells what the model is called with: give --input-shape, --data or "
                "--eval-data, or leave out --latency and the axis flops"
            )
        self.metric = one_metric(options, self.loaded)
        if self.metric.name in COLUMNS:
            raise InvalidArgument(
                f"metric {self.metric.name!r}: there is a column of this name; rename the function"
            )
        self.measured = Yardstick(
            self.loaded.model, example, options.include, options.exclude,
            _REPEAT if options.latency else 0,
        )  # fmt: skip
        self.usual = {v.name for v in self.measured.prunable(self.loaded.model)}
        self.drawn: dict[Any, Any] = {}  # calibration batches of the last recipe and seed

    def __call__(self, seed: int, text: str, amounts: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the table; of the dense model where there is no text of a recipe."""
        from sparseworks.cli.recipes import parse_recipe
        from sparseworks.cli.stages import changed

        if not text:
            row = self._row("dense", "dense", "", seed, self.loaded.model, 0.0, 0)
            metric, model = self.metric, self.loaded.model
            about = {
                "model": self.loaded.name,
                "metric": metric.name,
                "unit": metric.unit,
                "higher_is_better": metric.higher_is_better,
                "folder": hasattr(model, "config") and hasattr(model, "save_pretrained"),
            }
            return {"about": about, "row": row}
        recipe = parse_recipe(text)
        if self.drawn.get("of") != (seed, text):
            self.drawn = {"of": (seed, text)}
        done = changed(recipe, self.loaded, self.options, amounts, seed, self.drawn)
        untouched = {
            name for stage, result in done if stage.family != "slimming"
            for name in self.usual & set(result.skipped)
        }  # fmt: skip
        seconds = sum(result.seconds for _, result in done)
        amount, model = recipe.amount(amounts), done[-1][1].model
        return self._row(text, recipe.family, amount, seed, model, seconds, len(untouched))

    def _row(
        self, method: str, family: str, amount: str, seed: int, model: Any, seconds: float,
        untouched: int,
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "method": method,
            "family": family,
            "amount": amount,
            "seed": seed,
            self.metric.name: self.metric(model),
            **self.measured(model),
            "seconds": seconds,
            "untouched": untouched,
        }
