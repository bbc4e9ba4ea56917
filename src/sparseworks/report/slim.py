"""The page of `sparseworks slim`: widths before and after, what it saves, how to repeat it."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseworks.report.page import document, layout, plot, versions

__all__ = ["write_slim"]


def write_slim(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the page of one slimming.

    Args:
        path: of the HTML file.
        summary: what `sparseworks slim` writes to result.json.

    Raises:
        MissingDependency: plotly is not installed.
    """
    result = summary["result"]
    title = f"{summary['model']} slimmed by {result['method']}"
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=muted>{html.escape(summary['class'])}, {len(result['widths'])} widths smaller, "
        f"{len(result['shapes'])} tensors cut</p>",
        _cards(summary),
        *(f"<p><strong>Note:</strong> {html.escape(w)}</p>" for w in result["warnings"]),
    ]
    if result["blocks"]:
        gone = ", ".join(result["blocks"])
        sections.append(f"<p>Blocks dropped, one after the other: {html.escape(gone)}</p>")
    if result["widths"]:
        sections += ["<h2>Widths that stay</h2>", plot(_figure(result["widths"]), "widths")]
    if result["config"]:
        rows = _rows((n, v) for n, v in result["config"].items())
        sections.append(f"<h2>Config</h2><div class=scroll><table>{rows}</table></div>")
    head = "<tr><th>tensor<th>before<th>after</tr>"
    rows = _rows((n, _shape(a), _shape(b)) for n, (a, b) in result["shapes"].items())
    sections += [
        f"<h2>Every tensor cut</h2><div class=scroll><table>{head}{rows}</table></div>",
        f"<h2>Repeat it</h2><pre>{html.escape(summary['command'])}</pre>",
        f"<p class=muted>{html.escape(versions(summary['machine']))}</p>",
    ]
    document(path, title, sections)


def _cards(summary: Mapping[str, Any]) -> str:
    result = summary["result"]
    (f0, f1), (p0, p1) = result["flops"], result["parameters"]
    cards = [
        (f"{f1 / max(f0, 1):.1%}", f"of the operations stay, {f1 / 1e6:.4g} MFLOP"),
        (f"{p1 / max(p0, 1):.1%}", f"of the parameters stay, {p1:,}"),
    ]
    for name, (before, after) in summary["seconds per call"].items():
        text = f"faster in {name}, {before * 1e3:.4g} to {after * 1e3:.4g} ms a call"
        cards.append((f"{before / after:.2f}x", text))
    inner = "".join(
        f"<div class=card><b>{html.escape(v)}</b><span>{html.escape(t)}</span></div>"
        for v, t in cards
    )
    return f"<div class=cards>{inner}</div>"


def _rows(rows: Any) -> str:
    return "".join(f"<tr>{''.join(f'<td>{html.escape(str(v))}' for v in row)}</tr>" for row in rows)


def _shape(sizes: Any) -> str:
    return " x ".join(map(str, sizes))


def _figure(widths: list[Mapping[str, Any]]) -> Any:
    """Share of every width that stays; the numbers on hovering."""
    import plotly.graph_objects as go

    names = [w["name"] for w in widths]
    figure = go.Figure(
        go.Bar(
            x=list(range(len(names))),
            y=[w["after"] / w["before"] for w in widths],
            customdata=[[w["name"], w["before"], w["after"], w["per"]] for w in widths],
            marker_color="#0b6e63",
            hovertemplate="%{customdata[0]}<br>%{customdata[1]} to %{customdata[2]} "
            "(%{customdata[3]} channels each)<extra></extra>",
        )
    )
    figure.update_layout(**layout(xaxis_title="width, in order", yaxis_title="stays", bargap=0.15))
    figure.update_xaxes(dtick=max(1, len(names) // 10))
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return figure
