"""Is a comparison of sparse methods fair? Every rule: fair, unfair or unknown, and what to do.

Give the folders that `sparseworks train`, `tickets` or `prune` wrote, or descriptions in JSON or
YAML. Runs that differ in the seed alone are one arm; `name=folder` puts a run into the arm of that
name. A description says what a folder cannot know: `{"folder": "runs/rigl", "trials": 4}`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks audit`."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Two or more folders of recorded runs, name=folder, or files of descriptions."""
    cost: float = 0.05
    """Relative difference of multiply-adds that counts as equal."""
    seeds: int = 3
    """Fewest seeds of an arm."""
    out: Path | None = None
    """JSON file to write; it must not exist yet, unless --force."""
    force: bool = False
    """Replace --out."""
    strict: bool = False
    """Exit with code 1 where a check is unfair."""
    json: bool = False
    """Print as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Audit, show, write."""
    import sparseworks as sw
    from sparseworks.cli.preparing import check_output
    from sparseworks.cli.running import write_json

    if not options.runs:
        raise InvalidArgument("no runs given; for example: sparseworks audit runs/dense runs/rigl")
    check_output(options.out, options.force)
    audit = sw.audit(options.runs, cost=options.cost, seeds=options.seeds)
    found: dict[str, Any] = audit.to_dict()
    if options.out is not None:
        write_json(options.out, found)
    if options.json:
        json.dump(found, sys.stdout, indent=1, default=str)
        print()
    else:
        _show(audit, options)
    if options.strict and audit.verdict == "unfair":
        raise SystemExit(1)
    return found


def _show(audit: Any, options: Options) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    arms = Table(title="arms", title_justify="left")
    for heading in ("arm", "seeds", "score", "sparsity", "training", "call", "seconds"):
        arms.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in audit.arms:
        scores = list(arm.scores.values())
        score = f"{sum(scores) / len(scores):.4g}" if scores else "?"
        arms.add_row(
            escape(arm.name), str(len(arm.runs)), score,
            _number(arm.number("sparsity"), ".2%"), _number(arm.number("training_macs"), ".3g"),
            _number(arm.number("inference_macs"), ".3g"), _number(arm.number("seconds"), ".4g"),
        )  # fmt: skip
    console.print(arms)
    console.print("[dim]training and call: multiply-adds; what is masked counts as skipped[/dim]")
    table = Table(title="checks", title_justify="left", show_lines=True)
    table.add_column("check")
    table.add_column("verdict")
    table.add_column("why, and what to do", overflow="fold")
    colors = {"fair": "green", "unfair": "red", "unknown": "yellow"}
    for c in audit.checks:
        text = escape(c.reason) + (f"\n[italic]{escape(c.advice)}[/italic]" if c.advice else "")
        table.add_row(c.name, f"[{colors[c.verdict]}]{c.verdict}[/{colors[c.verdict]}]", text)
    console.print(table)
    counts = {v: sum(c.verdict == v for c in audit.checks) for v in colors}
    console.print(
        f"the comparison is [bold]{audit.verdict}[/bold]: "
        + ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    )
    if options.out is not None:
        console.print(f"wrote {options.out}", markup=False)


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)
