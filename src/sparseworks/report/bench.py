"""The page of `sparseworks bench`: samples a second of every candidate, and the table."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseworks.report.page import COLORS, document, layout, plot, versions

__all__ = ["write_bench"]


def write_bench(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        result: what the command writes to bench.json.

    Raises:
        MissingDependency: plotly is not installed.
    """
    machine = result["machine"]
    threads = machine["threads"]
    title = f"{result['model']} in {result['dtype']}: samples a second"
    head = "<tr><th>candidate<th>sparsity<th>batch<th>median ms<th>10-90 %<th>ours is faster by"
    rows = "".join(
        f"<tr><td>{html.escape(r['candidate'])}<td>{_sparsity(r)}<td>{r['batch']}"
        f"<td>{r['median_ms']:.3f}<td>{r['p10_ms']:.3f}-{r['p90_ms']:.3f}<td>{_ratio(r)}</tr>"
        for r in result["rows"]
    )
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=muted>{html.escape(machine['cpu'])}, {threads} thread{'s' * (threads > 1)}; "
        "medians of calls in turn, more is better</p>",
        plot(_figure(result["rows"]), "bench"),
        f"<h2>Every candidate</h2><div class=scroll><table>{head}</tr>{rows}</table></div>",
        *(f"<p><strong>Note:</strong> {html.escape(n)}</p>" for n in result["notes"]),
        f"<p class=muted>{html.escape(versions(machine))}</p>",
    ]
    document(path, title, sections)


def _sparsity(row: Mapping[str, Any]) -> str:
    return "as it is" if row["sparsity"] is None else f"{row['sparsity']:.0%}"


def _ratio(row: Mapping[str, Any]) -> str:
    ratio = row["ours_is_faster_by"]
    return "" if ratio is None else f"{ratio:.2f}x"


def _figure(rows: list[Mapping[str, Any]]) -> Any:
    """Groups of bars: a group a case, a colour a candidate."""
    import plotly.graph_objects as go

    cases = list(dict.fromkeys((_sparsity(r), r["batch"]) for r in rows))
    figure = go.Figure()
    for i, name in enumerate(dict.fromkeys(r["candidate"] for r in rows)):
        times = {(_sparsity(r), r["batch"]): r["median_ms"] for r in rows if r["candidate"] == name}
        figure.add_bar(
            name=name, x=[f"{s}, batch {b}" for s, b in cases],
            y=[case[1] / times[case] * 1e3 if case in times else None for case in cases],
            marker={"color": COLORS[i % len(COLORS)]},
            hovertemplate="%{x}: %{y:.4g} a second<extra>" + html.escape(name) + "</extra>",
        )  # fmt: skip
    figure.update_layout(
        **layout(yaxis_title="samples a second", height=420, barmode="group", showlegend=True,
                 legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    )  # fmt: skip
    return figure
