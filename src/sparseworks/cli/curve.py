"""How much of a trained model one-shot pruning removes for free: the metric over the sparsity.

Every method prunes copies of the model to every sparsity. The output folder holds result.json,
curve.csv, options.json, and curve.html (where plotly is installed).
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparseworks.cli.preparing import Measured, one_metric
from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options(Measured):
    """Options of `sparseworks curve`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """A model, as `sparseworks prune` takes it."""
    methods: tuple[str, ...] = ("magnitude", "random")
    """Registered one-shot methods; random is the control: is the metric one that notices?"""
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """At least three that rise."""
    tolerance: float = 0.01
    """Loss of quality, relative to the dense model, that counts as free."""
    budget: str = "global"
    """uniform, erk or global."""


class _Subject:
    """A model and its metric, that measures the curve of a method."""

    def __init__(self, options: Options) -> None:
        from sparseworks.cli.loading import load_model

        self.options = options
        self.loaded = load_model(options.model, options.dtype)
        self.metric = one_metric(options, self.loaded)

    def __call__(self, seed: int, method: str) -> dict[str, Any]:
        options, metric = self.options, self.metric
        curve = _measures(options)[method](
            self.loaded.model,
            metric,
            data=options.batches(self.loaded, method, seed),
            include=options.include or None,
            exclude=options.exclude or None,
            seed=seed,
        )
        about = {
            "model": self.loaded.name, "metric": metric.name, "unit": metric.unit,
            "higher_is_better": metric.higher_is_better,
        }  # fmt: skip
        return {"about": about, "curve": {"method": method, "seed": seed, **_plain(curve)}}


def _measures(options: Options) -> dict[str, Any]:
    from sparseworks.diagnostics.essential_sparsity import EssentialSparsity

    return {
        method: EssentialSparsity(method, options.budget, options.tolerance, options.sparsities)
        for method in options.methods
    }


def run(options: Options) -> dict[str, Any]:
    """Measure the curves, say where they end to be free, write them."""
    from sparseworks.cli.running import plain_options
    from sparseworks.diagnostics.claims import machine

    if not options.model:
        raise InvalidArgument("no model given; for example: sparseworks curve minilm")
    _measures(options)  # or what is wrong is said now
    options.checked()
    tasks = {f"{s}-{m}": (s, m) for s in options.seeds for m in options.methods}
    with options.swept(_Subject, tasks, "measuring") as answers:
        found = {
            **next(iter(answers.values()))["about"],
            "tolerance": options.tolerance,
            "curves": [a["curve"] for a in answers.values()],
            "options": plain_options(options),
            "machine": machine(),
        }
        if options.out is not None:
            _write(options.out, found)
    _show(found, options)
    return found


def _plain(curve: Any) -> dict[str, Any]:
    kink = curve.breakpoint
    return {
        "essential": curve.essential,
        "turns_at": kink.at,
        "slope_before": kink.before,
        "slope_after": kink.after,
        "sharpness": kink.sharpness if math.isfinite(kink.sharpness) else None,
        "sparsities": list(curve.sparsities),
        "values": list(curve.values),
        "drops": list(curve.drops),
    }


def _write(out: Path, found: dict[str, Any]) -> None:
    from sparseworks.cli.running import write_csv, write_json

    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"method": c["method"], "seed": c["seed"], "sparsity": s, found["metric"]: v, "drop": d}
        for c in found["curves"]
        for s, v, d in zip(c["sparsities"], c["values"], c["drops"])
    ]
    write_csv(out / "curve.csv", rows)
    write_json(out / "options.json", found["options"])
    if importlib.util.find_spec("plotly") is not None:
        from sparseworks.report.curve import write_curve

        write_curve(out / "curve.html", found)
    write_json(out / "result.json", found)


def _show(found: dict[str, Any], options: Options) -> None:
    if options.json:
        json.dump(found, sys.stdout, indent=1, default=str)
        print()
        return
    from rich.console import Console
    from rich.table import Table

    dense = found["curves"][0]["values"][0]
    table = Table(
        title=f"{found['model']}: {found['metric']}, dense {dense:.4g}; free up to a loss of "
        f"{options.tolerance:.2%}",
        title_justify="left",
    )
    several = len(options.seeds) > 1
    for name in ("method", *(["seed"] if several else []), "free up to", "turns at", "steeper"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for sparsity in options.sparsities:
        table.add_column(f"{sparsity:.4g}", justify="right")
    for c in found["curves"]:
        steeper = "" if c["sharpness"] is None else f"{c['sharpness']:.3g} x"
        table.add_row(
            c["method"],
            *([str(c["seed"])] if several else []),
            f"[bold]{c['essential']:.4g}[/bold]",
            f"{c['turns_at']:.2f}",
            steeper,
            *(f"{v:.4g}" for v in c["values"][1:]),
        )
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    if options.out is not None:
        print(f"wrote {options.out / 'result.json'}, curve.csv and the page curve.html")
