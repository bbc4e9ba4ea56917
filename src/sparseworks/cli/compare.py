"""Methods x sparsities on one model and metric: a table, a CSV, a plot."""

from __future__ import annotations

import copy
import importlib.util
import json
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
    """Options of `sparseworks compare`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """A model, as `sparseworks prune` takes it."""
    methods: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt")
    """Registered one-shot methods."""
    sparsities: tuple[str, ...] = ("0.5", "0.6", "0.7", "2:4")
    """Sparsities, or N:M patterns."""


class _Subject:
    """A model and its metric, that prunes a copy for every cell of the table and measures it."""

    def __init__(self, options: Options) -> None:
        from sparseworks.cli.loading import load_model

        self.options = options
        self.loaded = load_model(options.model, options.dtype)
        self.metric = one_metric(options, self.loaded)
        self.drawn: tuple[Any, Any] = None, None  # calibration batches of the last method and seed

    def __call__(self, seed: int, method: str, amount: str) -> dict[str, Any]:
        import sparseworks as sw

        if not method:
            metric = self.metric
            return {
                "model": self.loaded.name, "metric": metric.name, "unit": metric.unit,
                "higher_is_better": metric.higher_is_better, "dense": metric(self.loaded.model),
            }  # fmt: skip
        if self.drawn[0] != (seed, method):
            self.drawn = (seed, method), self.options.batches(self.loaded, method, seed)
        twin = copy.deepcopy(self.loaded.model)
        result = sw.prune(
            twin, method, data=self.drawn[1], seed=seed, include=self.options.include or None,
            exclude=self.options.exclude or None, **parse_amount(amount),
        )  # fmt: skip
        return {
            "method": method,
            "amount": amount,
            "sparsity": result.sparsity,
            "seed": seed,
            self.metric.name: self.metric(twin),
            "seconds": result.seconds,
        }


def run(options: Options) -> dict[str, Any]:
    """Prune a copy for every cell of the table and measure it."""
    from sparseworks.cli.running import plain_options
    from sparseworks.core import registry
    from sparseworks.diagnostics.claims import machine
    from sparseworks.diagnostics.sweeping import finish

    if not options.model:
        raise InvalidArgument("no model given; for example: sparseworks compare minilm")
    for text in options.sparsities:
        parse_amount(text)
    for method in options.methods:
        registry.resolve(method)
    options.checked()
    cells = {
        f"{seed}-{method}-{text.replace(':', 'of')}": (seed, method, text)
        for seed in options.seeds for method in options.methods for text in options.sparsities
    }  # fmt: skip
    dense, *rows = options.swept(_Subject, {"dense": (0, "", ""), **cells}, "comparing").values()
    found = {
        **dense,
        "rows": rows,
        "options": plain_options(options),
        "machine": machine(),
    }
    if options.out is not None:
        _write(options.out, found)
        finish(options.out / "tasks")
    _show(found, options)
    return found


def parse_amount(text: str) -> dict[str, Any]:
    """`{"sparsity": 0.5}` or `{"pattern": "2:4"}` from one word."""
    from sparseworks.core.patterns import check_sparsity, parse_pattern

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


def _mean(found: dict[str, Any], method: str, amount: str) -> tuple[float, float]:
    values = [
        r[found["metric"]] for r in found["rows"] if r["method"] == method and r["amount"] == amount
    ]
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
    return mean, spread


def _write(out: Path, found: dict[str, Any]) -> None:
    from sparseworks.cli.running import write_csv, write_json
    from sparseworks.report.compare import write_comparison

    out.mkdir(exist_ok=True)
    write_csv(out / "compare.csv", found["rows"])
    write_json(out / "compare.json", found)
    write_json(out / "options.json", found["options"])
    if importlib.util.find_spec("plotly") is not None:
        write_comparison(out / "compare.html", found)


def _show(found: dict[str, Any], options: Options) -> None:
    if options.json:
        json.dump(found, sys.stdout, indent=1, default=str)
        print()
        return
    from rich.console import Console
    from rich.table import Table

    arrow = "higher is better" if found["higher_is_better"] else "lower is better"
    table = Table(
        title=f"{found['model']}: {found['metric']} ({arrow}), dense {found['dense']:.4g}",
        title_justify="left",
    )
    table.add_column("method")
    for amount in options.sparsities:
        table.add_column(amount, justify="right")
    best = {}
    for amount in options.sparsities:
        means = {m: _mean(found, m, amount)[0] for m in options.methods}
        best[amount] = (max if found["higher_is_better"] else min)(means, key=means.__getitem__)
    for method in options.methods:
        cells = []
        for amount in options.sparsities:
            mean, spread = _mean(found, method, amount)
            text = f"{mean:.4g}" + (f" ±{spread:.2g}" if len(options.seeds) > 1 else "")
            cells.append(f"[bold]{text}[/bold]" if best[amount] == method else text)
        table.add_row(method, *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if options.out is not None:
        page = options.out / "compare.html"
        print(f"wrote {f'{page}, ' if page.is_file() else ''}compare.csv and compare.json")
