"""Run, list and tabulate the papers' claims in miniature. Claims run from a checkout."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks claims`."""

    action: Annotated[Literal["list", "run", "table"], tyro.conf.Positional] = "list"
    """list: all claims and verdicts (outdated: the claim is newer than its result); run: measure
    some; table: Markdown for the documentation."""
    cards: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Card numbers to run (a01 a02 ...)."""
    folder: Path = Path("claims")
    """Where the claims are."""
    full: bool = False
    """The paper's budget instead of a few minutes."""
    seeds: tuple[int, ...] = ()
    """Seeds to run, judged together; default: the claim's own, with its looks."""
    runs: Path = Path("runs/claims")
    """Where measured seeds are kept; none of them is measured again."""
    ray: bool = False
    """Spread the seeds over a Ray cluster (RAY_ADDRESS, else the processors of this machine)."""
    json: bool = False
    """Print as JSON."""


def run(options: Options) -> None:
    """List, run or tabulate."""
    from sparseworks.diagnostics import claims

    if options.action == "table":
        print(claims.table(options.folder), end="")
        return
    if options.action == "list":
        _list(options)
        return
    files = claims.find_claims(options.folder)
    unknown = [c for c in options.cards if c not in files]
    if unknown or not options.cards:
        what = f"no claim {unknown[0]!r}" if unknown else "which claim?"
        raise InvalidArgument(f"{what}; there are {', '.join(files)}")
    if not options.ray:
        for card in options.cards:
            _show(_measured(files[card], options, None), options)
        return
    from concurrent.futures import ThreadPoolExecutor

    # a thread a claim: they wait for the workers, which measure seeds of all of them
    with claims.Cluster() as cluster, ThreadPoolExecutor(len(options.cards)) as pool:
        paths = [files[card] for card in options.cards]
        for result in pool.map(lambda path: _measured(path, options, cluster), paths):
            _show(result, options)


def _measured(path: Path, options: Options, cluster: Any) -> dict[str, Any]:
    from sparseworks.cli.running import progress_bar
    from sparseworks.diagnostics import claims

    with progress_bar(
        f"claim {path.stem[:3]}", quiet=options.json or (options.ray and len(options.cards) > 1)
    ) as progress:
        return claims.run(
            path,
            setting="full" if options.full else "quick",
            seeds=options.seeds or None,
            runs=options.runs,
            cluster=cluster,
            progress=progress,
        )


def _show(result: dict[str, Any], options: Options) -> None:
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        print()
        return
    card = result["card"]
    print(f"{card} {result['title']}: {result['verdict']} ({result['seconds']:.0f} s)")
    for p in result["promises"]:
        interval = p["interval"]
        shown = f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "one value"
        seeds = f"{p['seeds']} seeds"
        print(f"  {p['verdict']:<13} {p['mean']:.4g} {shown}, {seeds}  {p['statement']}")


def _list(options: Options) -> None:
    from sparseworks.diagnostics import claims

    known = {r["card"]: r for r in claims.results(options.folder)}
    rows = [{"card": c, "claim": r["title"], "verdict": r["verdict"]} for c, r in known.items()]
    if options.folder.is_dir():
        for card, path in claims.find_claims(options.folder).items():
            if card not in known:
                rows.append({"card": card, "claim": path.stem[4:], "verdict": "not run"})
            elif claims.load_claim(path).version != known[card].get("version", 1):
                row = next(r for r in rows if r["card"] == card)
                row["verdict"] += ", outdated"
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return
    for row in rows:
        print(f"{row['card']}  {row['verdict']:<21} {row['claim']}")
