"""The best model under your goals, found within a time: slimmed, pruned, in fewer bits, combined.

What our measured tables say is worth trying is tried, the most promising first, and every model is
compiled and timed beside the dense one in torch. Goals are shares of the dense model's: latency,
size and flops at most, quality at least (accuracy, fidelity, or perplexity's inverse). With a goal
of quality the fastest model that keeps it is chosen, else the best one that is cheap enough.

The output folder holds the chosen model (best/checkpoint, and best/compiled for `load_compiled` or
`load_decoder`), recipe.json, recipe.csv, options.json and the page recipe.html: all that was tried,
the Pareto front, and what was not tried.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparseworks.cli.fields import BatchSize, Data, EvalData, EvalSamples, Length, Samples
from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks recipe`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """Hugging Face folder or hub name, `minilm`, a CIFAR ResNet .safetensors, file.py:factory."""
    goal: tuple[str, ...] = ()
    """latency=0.5, size=0.3, flops=0.5 (at most), quality=0.99 (at least): shares of the dense
    model's. None: all is tried, and the front is told."""
    budget: str = "10m"
    """Time for the search: 90s, 30m, 2h."""
    data: Data = None
    samples: Samples = 128
    length: Length = 256
    batch_size: BatchSize = 8
    metric: str | None = None
    """The quality: perplexity, fidelity, retrieval, accuracy, file.py:function; default: the first
    that fits the model."""
    eval_data: EvalData = None
    eval_samples: EvalSamples = None
    dtypes: tuple[str, ...] = ()
    """What may be computed in, exact ones first; default: fp32 bf16 int8, of language models bf16
    int8 int4."""
    slimming: bool = True
    """Also try models with fewer units."""
    batch: int = 1
    """Samples of the call that is timed."""
    tokens: int = 128
    """Tokens of each text of that call."""
    input_shape: tuple[int, ...] = ()
    """Shape of one sample (3 224 224) where neither the model nor data tell."""
    include: tuple[str, ...] = ()
    """Name patterns of the only weights to prune."""
    exclude: tuple[str, ...] = ()
    """Name patterns of weights to leave dense."""
    seed: int = 0
    """Of calibration samples."""
    out: Path | None = None
    """Output folder; it must not exist yet, unless --force."""
    force: bool = False
    """Replace the output folder."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Search, tell, write."""
    from sparseworks.cli.preparing import check_inputs, check_output
    from sparseworks.cli.running import plain_options, progress_bar
    from sparseworks.cli.trials import trial_of
    from sparseworks.cli.worth_trying import ladders_for, not_tried
    from sparseworks.diagnostics.claims import machine
    from sparseworks.diagnostics.goals import best_of, parse_goals, search, seconds_of

    if not options.model:
        raise InvalidArgument("no model given; for example: sparseworks recipe minilm --budget 5m")
    goals, seconds = parse_goals(options.goal), seconds_of(options.budget)
    check_output(options.out, options.force)
    check_inputs(options)
    trial = trial_of(options)
    ladders = ladders_for(
        trial.loaded.kind, trial.dtypes, data=trial.has_data, slims=options.slimming
    )
    count = sum(map(len, ladders))
    with progress_bar("trying", quiet=options.json) as progress:

        def measure(rung: Any) -> Mapping[str, float]:
            progress(len(trial.rows), count, f"{rung.ladder} {trial.amount(rung)}")
            return trial(rung)

        tried, left = search(ladders, goals, measure, seconds)
    best = best_of(tried, goals)
    found: dict[str, Any] = {
        **trial.about(), **trial.points(tried, best), "goals": list(options.goal),
        "best": None if best is None else trial.told(best),
        "best_shares": None if best is None else dict(tried[best]),
        "not_tried": [{**trial.told(rung), "why": why} for rung, why in left.items()],
        "takes_training": list(not_tried(trial.loaded, options)),
        "options": plain_options(options), "machine": machine(),
    }  # fmt: skip
    if options.out is not None:
        _write(options, trial, best, found)
    _show(options, found)
    return found


def _write(options: Options, trial: Any, best: Any, found: Mapping[str, Any]) -> None:
    from sparseworks.cli.running import write_csv, write_json
    from sparseworks.io.atomic import replaced_folder

    assert options.out is not None
    with replaced_folder(options.out) as made:
        if best is not None:
            trial.save(best, made / "best")
        write_csv(made / "recipe.csv", found["rows"])
        write_json(made / "options.json", found["options"])
        if importlib.util.find_spec("plotly") is not None:
            from sparseworks.report.recipe import write_recipe

            write_recipe(made / "recipe.html", found)
        write_json(made / "recipe.json", found)


def _show(options: Options, found: Mapping[str, Any]) -> None:
    if options.json:
        json.dump(found, sys.stdout, indent=1, default=str)
        print()
        return
    from rich.console import Console
    from rich.table import Table

    arrow = "higher is better" if found["higher_is_better"] else "lower is better"
    name = Path(found["model"]).name
    title = f"{name}: {found['metric']} ({arrow}); * the front of quality against latency"
    table = Table(title=title, title_justify="left")
    for name in ("", "model", found["metric"], "ms", "x torch", "MB"):
        table.add_column(name, justify="left" if name in ("", "model") else "right")
    for p in found["points"]:
        v = {n: x[0] for n, x in p["values"].items()}
        style = "bold" if p.get("best") else ""
        name = f"{p['method']} {p['amount']}".strip()
        cells = (f"{v['quality']:.4g}", f"{v['latency']:.3g}", f"{v['speedup']:.2f}",
                 f"{v['size'] / 1e6:.2f}")  # fmt: skip
        table.add_row("*" if p["front"] else "", name, *cells, style=style)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(_verdict(found), markup=False)
    late = [r for r in found["not_tried"] if r["why"].startswith("no time")]
    if late:
        console.print(f"not tried, for lack of time: {len(late)} models; more --budget tries them")
    for words in found["takes_training"]:
        console.print(f"not tried: {words}", markup=False)
    if options.out is not None:
        console.print(f"wrote {options.out / 'recipe.html'}, recipe.json and recipe.csv")


def _verdict(found: Mapping[str, Any]) -> str:
    if found["best"] is None:
        return f"none of the models tried meets {' '.join(found['goals'])}"
    told = ", ".join(f"{n} {v:.3g}" for n, v in found["best_shares"].items())
    under = f" under {' '.join(found['goals'])}" if found["goals"] else ""
    name = f"{found['best']['method']} {found['best']['amount']}".strip()
    return f"best{under}: {name} ({told} of the dense model's)"
