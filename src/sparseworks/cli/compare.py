"""What several methods trade on one model: quality against sparsity, size, FLOPs and latency.

Every method, and every combination written as one (`wanda+rounding`: pruned, then quantized), is
applied to copies of the model, and all copies are measured alike. The output folder holds
compare.csv (a row a run), compare.json (also means, intervals, the Pareto front, and the command
of every point), options.json, and the page compare.html (where plotly is installed).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparseworks.cli.comparing import Subject
from sparseworks.cli.preparing import Measured
from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options(Measured):
    """Options of `sparseworks compare`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """A model, as `sparseworks prune` takes it."""
    methods: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt")
    """Methods that prune (wanda), slim (group-norm) or quantize (rounding), or several one after
    the other: wanda+rounding. Options follow a colon: rounding:bits=8,group=16."""
    sparsities: tuple[str, ...] = ("0.5", "0.6", "0.7", "2:4")
    """Of methods that prune: sparsities, or N:M patterns."""
    flops: tuple[float, ...] = (0.8, 0.6, 0.4)
    """Of methods that slim: shares of the operations that stay."""
    bits: tuple[float, ...] = (8, 4)
    """Of methods that quantize."""
    skip_indivisible: bool = False
    """Leave tensors dense that cannot take an N:M pattern, instead of an error."""
    latency: bool = False
    """Also compile every copy and time it, in turn with the dense model in torch."""
    batch: int = 1
    """Samples of the call that is counted and timed."""
    tokens: int = 128
    """Tokens of each text of that call."""
    input_shape: tuple[int, ...] = ()
    """Shape of one sample (3 224 224) where neither the model nor data tell."""
    x: str = "size"
    """What the front trades: size, flops, latency, speedup, sparsity, seconds or quality."""
    y: str = "quality"
    """Against this."""


def run(options: Options) -> dict[str, Any]:
    """Change and measure a copy for every cell of the table."""
    from sparseworks.cli.recipes import parse_recipe
    from sparseworks.cli.running import plain_options
    from sparseworks.diagnostics.claims import machine

    if not options.model:
        raise InvalidArgument("no model given; for example: sparseworks compare minilm")
    recipes = [parse_recipe(text) for text in dict.fromkeys(options.methods)]
    swept = _checked(options, recipes)
    cells = {
        (seed, recipe.text, recipe.amount(amounts)): (recipe, amounts)
        for seed in options.seeds for recipe in recipes for amounts in recipe.amounts(swept)
    }  # fmt: skip
    tasks = {
        f"{seed}-{recipe.file_name(amounts)}": (seed, recipe.text, amounts)
        for (seed, _, _), (recipe, amounts) in cells.items()
    }
    with options.swept(Subject, {"dense": (0, "", {}), **tasks}, "comparing") as answers:
        dense, *rows = answers.values()
        found = {
            **{k: v for k, v in dense["about"].items() if k != "folder"},
            "dense": dense["row"][dense["about"]["metric"]],
            **_gathered(options, dense, rows, list(cells.values())),
            "options": plain_options(options),
            "machine": machine(),
        }
        if options.out is not None:
            _write(options.out, found)
    _show(found, options)
    return found


def _checked(options: Options, recipes: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """What is swept, by what it is; refused is what cannot be measured, before a model is loaded.

    Raises:
        InvalidArgument: an amount, an axis, or a combination that is none.
    """
    from sparseworks.cli.recipes import parse_amount
    from sparseworks.diagnostics.tradeoffs import AXES

    for text in options.sparsities:
        parse_amount(text)
    if odd := [v for v in options.flops if not 0 < v < 1]:
        raise InvalidArgument(f"--flops {odd[0]:g}: shares of the operations that stay, in (0, 1)")
    swept = {
        "sparsity": tuple(dict.fromkeys(options.sparsities)),
        "flops": tuple(dict.fromkeys(options.flops)),
        "bits": tuple(dict.fromkeys(int(b) if b == int(b) else b for b in options.bits)),
    }
    for recipe in recipes:
        recipe.check(swept)
    names = [a.name for a in AXES]
    for flag, axis in (("--x", options.x), ("--y", options.y)):
        if axis not in names:
            raise InvalidArgument(f"{flag} {axis}: one of {', '.join(names)}")
        if axis in ("latency", "speedup") and not options.latency:
            raise InvalidArgument(f"{flag} {axis}: is measured with --latency only")
    if options.x == options.y:
        raise InvalidArgument(f"--x and --y are both {options.x}: a trade-off has two sides")
    if options.latency and options.dtype not in (None, "fp32", "float32"):
        raise InvalidArgument("--latency compiles models in fp32: leave --dtype out")
    if min((options.batch, options.tokens, *options.input_shape)) < 1:
        raise InvalidArgument("--batch, --tokens and --input-shape must be at least 1")
    options.checked()
    return swept


def _gathered(
    options: Options, dense: Mapping[str, Any], rows: list[dict[str, Any]],
    cells: Sequence[tuple[Any, Mapping[str, Any]]],
) -> dict[str, Any]:  # fmt: skip
    """Axes, points (the dense model first) and rows, with front and commands."""
    from sparseworks.cli.reproducing import making, measuring
    from sparseworks.diagnostics.tradeoffs import (
        mean_and_interval,
        pareto_front,
        present,
        told_of,
    )

    about = dense["about"]
    axes = present([dense["row"], *rows], about["metric"], about["unit"], about["higher_is_better"])
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {("dense", ""): [dense["row"]]}
    points: list[dict[str, Any]] = [{"line": "", "make": None, "measure": None}]
    for row, (recipe, amounts) in zip(rows, cells, strict=True):
        key = row["method"], row["amount"]
        if key not in groups:
            points.append({
                "line": recipe.line(amounts),
                "make": making(options, recipe, amounts, folder=about["folder"]),
                "measure": measuring(options, recipe, amounts),
            })  # fmt: skip
        groups.setdefault(key, []).append(row)
    for point, group in zip(points, groups.values(), strict=True):
        point |= {k: group[0][k] for k in ("method", "family", "amount", "untouched")}
        point["seeds"] = len(group)
        point["values"] = {
            name: mean_and_interval([r[axis.column] for r in group]) for name, axis in axes.items()
        }
    x, y = axes[options.x], axes[options.y]
    front = pareto_front(
        [(p["values"][x.name][0], p["values"][y.name][0]) for p in points],
        (x.higher_is_better, y.higher_is_better),
    )
    for on, point, group in zip(front, points, groups.values(), strict=True):
        point["front"] = on
        for row in group:
            row |= {"front": on, "command": point["make"] or point["measure"]}
    return {"x": x.name, "y": y.name, "axes": told_of(axes), "points": points, "rows": rows}


def _write(out: Path, found: dict[str, Any]) -> None:
    from sparseworks.cli.running import write_csv, write_json

    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "compare.csv", found["rows"])
    write_json(out / "options.json", found["options"])
    if importlib.util.find_spec("plotly") is not None:
        from sparseworks.report.compare import write_comparison

        write_comparison(out / "compare.html", found)
    write_json(out / "compare.json", found)


def _show(found: dict[str, Any], options: Options) -> None:
    if options.json:
        json.dump(found, sys.stdout, indent=1, default=str)
        print()
        return
    from rich.console import Console
    from rich.table import Table

    arrow = "higher is better" if found["higher_is_better"] else "lower is better"
    table = Table(
        title=f"{found['model']}: {found['metric']} ({arrow}); * the front of {found['y']} "
        f"against {found['x']}",
        title_justify="left",
    )
    table.add_column("")
    for name in ("method", "amount"):
        table.add_column(name, no_wrap=True)
    for axis in found["axes"].values():
        table.add_column(axis["label"].split(",")[0], justify="right")
    for p in found["points"]:
        cells = [_cell(v, found["axes"][n]["scale"]) for n, v in p["values"].items()]
        style = "bold" if p["front"] else ""
        table.add_row("*" if p["front"] else "", p["method"], p["amount"], *cells, style=style)
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    if options.out is not None:
        page = options.out / "compare.html"
        print(f"wrote {f'{page}, ' if page.is_file() else ''}compare.csv and compare.json")


def _cell(value: Sequence[Any], scale: float) -> str:
    mean, low, high = value
    told = f"{mean / scale:.4g}"
    half = None if low is None else (high - low) / 2 / scale
    return f"{told} ±{half:.2g}" if half else told
