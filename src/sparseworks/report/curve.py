"""The page of `sparseworks curve`: what every sparsity costs, and where it ceases to be free."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseworks.report.page import COLORS, document, layout, plot, versions

__all__ = ["write_curve"]


def write_curve(path: Path, found: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        found: what the command writes to result.json.

    Raises:
        MissingDependency: plotly is not installed.
    """
    metric = found["metric"]
    title = f"What one-shot pruning removes from {found['model']} for free"
    better = "higher" if found["higher_is_better"] else "lower"
    best = max(found["curves"], key=lambda c: c["essential"])
    cards = "".join(
        f"<div class=card><b>{html.escape(value)}</b><span>{html.escape(text)}</span></div>"
        for value, text in (
            (f"{best['essential']:.0%}", f"pruned by {best['method']} within the tolerance"),
            (f"{found['tolerance']:.1%}", "relative loss of quality that counts as free"),
            (f"{best['values'][0]:.4g} {found['unit']}", f"{metric} of the dense model"),
        )
    )
    head = "<tr><th>method<th>seed<th>free up to<th>turns at<th>slope before<th>slope after</tr>"
    rows = "".join(
        f"<tr><td>{html.escape(c['method'])}<td>{c['seed']}<td>{c['essential']:.0%}"
        f"<td>{c['turns_at']:.1%}<td>{c['slope_before']:.3g}<td>{c['slope_after']:.3g}</tr>"
        for c in found["curves"]
    )
    points = "".join(
        f"<tr><td>{html.escape(c['method'])}<td>{c['seed']}<td>{s:.1%}<td>{v:.4g}<td>{d:+.2%}</tr>"
        for c in found["curves"]
        for s, v, d in zip(c["sparsities"], c["values"], c["drops"])
    )
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=muted>{html.escape(metric)}, {better} is better; every point is a copy of the "
        "trained model, pruned once and not trained again</p>",
        f"<div class=cards>{cards}</div>",
        "<h2>Loss of quality over sparsity</h2>",
        plot(_figure(found), "curve"),
        "<h2>Where the curve turns</h2><p class=muted>The best fit of two lines that meet; slopes "
        "are relative loss per unit of sparsity.</p>",
        f"<div class=scroll><table>{head}{rows}</table></div>",
        f"<h2>Every point</h2><div class=scroll><table><tr><th>method<th>seed<th>sparsity"
        f"<th>{html.escape(metric)}<th>loss of quality</tr>{points}</table></div>",
        f"<p class=muted>{html.escape(versions(found['machine']))}</p>",
    ]
    document(path, title, sections)


def _figure(found: Mapping[str, Any]) -> Any:
    """The drops; a dotted line at the tolerance, a dot where each curve is free at last."""
    import plotly.graph_objects as go

    figure = go.Figure()
    methods = list(dict.fromkeys(c["method"] for c in found["curves"]))
    seen = set()
    for c in found["curves"]:
        color = COLORS[methods.index(c["method"]) % len(COLORS)]
        free = [i for i, s in enumerate(c["sparsities"]) if s == c["essential"]]
        figure.add_trace(
            go.Scatter(
                x=[100 * s for s in c["sparsities"]],
                y=[100 * d for d in c["drops"]],
                customdata=c["values"], name=c["method"], legendgroup=c["method"],
                showlegend=c["method"] not in seen, mode="lines+markers",
                line={"color": color, "width": 2},
                marker={"size": [13 if i in free else 6 for i in range(len(c["drops"]))]},
                hovertemplate="%{x:.3g} %: %{customdata:.4g}<extra>" + c["method"] + "</extra>",
            )
        )  # fmt: skip
        seen.add(c["method"])
    figure.add_hline(y=100 * found["tolerance"], line_dash="dot", line_color="#5d6b68",
                     annotation_text="tolerance")  # fmt: skip
    figure.update_layout(
        **layout(xaxis_title="sparsity (%)", yaxis_title="loss of quality (%)", height=420)
    )
    return figure
