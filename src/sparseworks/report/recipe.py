"""The page of a recipe: the verdict, what was tried, and what was not."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseworks.report.compare import write_comparison

__all__ = ["write_recipe"]


def write_recipe(path: Path, found: Mapping[str, Any]) -> None:
    """Write the page of `sparseworks recipe`: that of a comparison, with the verdict above it.

    Args:
        path: of the HTML file.
        found: what the command writes to recipe.json.

    Raises:
        MissingDependency: plotly is not installed.
    """
    name = Path(found["model"]).name
    title = f"The best {name} under {' and '.join(found['goals']) or 'no goal'}"
    write_comparison(path, found, title=title, above=_cards(found), below=_left(found))


def _cards(found: Mapping[str, Any]) -> str:
    if found["best"] is None:
        cards = [("none", f"of {len(found['rows']) - 1} models meets the goals")]
    else:
        best = f"{found['best']['method']} {found['best']['amount']}"
        cards = [(best, "is the best under the goals")]
        words = {"latency": "of the time of dense torch", "size": "of its bytes",
                 "flops": "of its operations", "quality": f"of its {found['metric']}"}  # fmt: skip
        cards += [(f"{v:.1%}", words[n]) for n, v in found["best_shares"].items()]
    inner = "".join(
        f"<div class=card><b>{html.escape(v)}</b><span>{html.escape(t)}</span></div>"
        for v, t in cards
    )
    return f"<div class=cards>{inner}</div>"


def _left(found: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(r['method'])} {html.escape(r['amount'])}<td>{html.escape(r['why'])}"
        for r in found["not_tried"]
    )
    training = "".join(f"<li>{html.escape(words)}" for words in found["takes_training"])
    return (
        "<h2>Not tried</h2><p class=muted>What takes training:</p>"
        f"<ul>{training}</ul>"
        f"<div class=scroll><table><tr><th>model<th>why{rows}</table></div>"
    )
