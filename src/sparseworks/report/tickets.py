"""The page of an experiment: the score of every training against the weights that are left."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseworks.report.page import document, layout, plot, versions

__all__ = ["write_tickets"]

_ON_THE_WAY = re.compile(r"dense|level \d+|phase \d+")


def write_tickets(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the page of `sparseworks tickets`.

    Args:
        path: of the HTML file.
        summary: what the command writes to result.json.

    Raises:
        MissingDependency: plotly is not installed.
    """
    said = summary["experiment"]
    runs = {n: r for n, r in said["runs"].items() if "score" in r}
    title = f"{summary['model']} by {said['method']}"
    head = "<tr><th>training<th>weights left<th>accuracy, held out<th>from step<th>folder</tr>"
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{1 - r['sparsity']:.2%}<td>{r['score']:.2f}"
        f"<td>{r.get('first_step', '')}<td>{r['run']}</tr>"
        for name, r in runs.items()
    )
    figures = "".join(
        f"<tr><td>{html.escape(n)}<td>{v:.4g}</tr>" for n, v in said["figures"].items()
    )
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=muted>{html.escape(summary['class'])}, {summary['sparsity']:.2%} of the masked "
        f"tensors' weights are zero; the model is the training {html.escape(said['result'])!r}</p>",
        "<h2>Accuracy and weights left</h2>",
        plot(_curve(runs), "curve"),
        f"<h2>Every training</h2><div class=scroll><table>{head}{rows}</table></div>",
    ]
    if figures:
        sections.append(f"<h2>Measured</h2><div class=scroll><table>{figures}</table></div>")
    sections.append(f"<p class=muted>{html.escape(versions(summary['machine']))}</p>")
    document(path, title, sections)


def _curve(runs: Mapping[str, Any]) -> Any:
    """The trainings on the way to the result as a line, all others as points."""
    import plotly.graph_objects as go

    way = [n for n in runs if _ON_THE_WAY.fullmatch(n)]
    others = [n for n in runs if n not in way and n not in ("rewind point", "new values")]
    figure = go.Figure()
    for names, label, mode, color in (
        (way, "on the way", "lines+markers", "#0b6e63"),
        (others, "others", "markers", "#c2571a"),
    ):
        figure.add_trace(
            go.Scatter(
                x=[100 * (1 - runs[n]["sparsity"]) for n in names],
                y=[runs[n]["score"] for n in names],
                customdata=names, name=label, mode=mode, line={"color": color, "width": 2},
                marker={"size": 8, "color": color},
                hovertemplate="%{customdata}<br>%{x:.3g} % left: %{y:.2f}<extra></extra>",
            )
        )  # fmt: skip
    figure.update_layout(
        **layout(xaxis_title="weights left (%)", yaxis_title="held-out accuracy (%)", height=420)
    )
    figure.update_xaxes(type="log", autorange="reversed")
    return figure
