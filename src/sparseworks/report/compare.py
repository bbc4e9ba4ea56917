"""The page of a comparison: one line per method over the sparsities, and the table."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseworks.report.page import COLORS, document, layout, plot, versions

__all__ = ["write_comparison"]


def write_comparison(path: Path, found: Mapping[str, Any]) -> None:
    """Write the page of `sparseworks compare`."""
    import plotly.graph_objects as go

    metric = found["metric"]
    methods = list(dict.fromkeys(r["method"] for r in found["rows"]))
    amounts = list(dict.fromkeys(r["amount"] for r in found["rows"]))
    figure = go.Figure()
    for i, method in enumerate(methods):
        rows = [r for r in found["rows"] if r["method"] == method]
        values = [
            sum(r[metric] for r in rows if r["amount"] == a)
            / sum(1 for r in rows if r["amount"] == a)
            for a in amounts
        ]
        figure.add_trace(
            go.Scatter(
                x=amounts,
                y=values,
                name=method,
                mode="lines+markers",
                line={"color": COLORS[i % len(COLORS)], "width": 2},
                marker={"size": 8},
            )
        )
    figure.add_hline(
        y=found["dense"], line_dash="dot", line_color="#5d6b68", annotation_text="dense"
    )
    figure.update_layout(**layout(xaxis_title="sparsity", yaxis_title=metric, height=420))
    figure.update_xaxes(type="category")
    if not found["higher_is_better"]:
        figure.update_yaxes(type="log")
    title = f"{metric} of {found['model']} by method and sparsity"
    head = "<tr><th>method<th>sparsity<th>seed<th>" + html.escape(metric) + "<th>seconds</tr>"
    rows_html = "".join(
        f"<tr><td>{html.escape(r['method'])}<td>{html.escape(r['amount'])}<td>{r['seed']}"
        f"<td>{r[metric]:.4g}<td>{r['seconds']:.1f}</tr>"
        for r in found["rows"]
    )
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=muted>dense {found['dense']:.4g}; "
        f"{'higher' if found['higher_is_better'] else 'lower'} is better</p>",
        plot(figure, "compare"),
        f"<h2>Every run</h2><div class=scroll><table>{head}{rows_html}</table></div>",
        f"<p class=muted>{html.escape(versions(found['machine']))}</p>",
    ]
    document(path, title, sections)
