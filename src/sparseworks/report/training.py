"""The page of a training: masks and loss over its steps, beside those of a dense twin."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseworks.report.page import COLORS, document, layout, plot, versions

__all__ = ["write_training"]

_HEAT = [[0, "#f3f6f5"], [0.5, "#7fb5aa"], [1, "#083f39"]]


def write_training(
    path: Path,
    summary: Mapping[str, Any],
    trace: Mapping[str, Any],
    twin: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
) -> None:
    """Write the page of `sparseworks train`.

    Args:
        path: of the HTML file.
        summary: what the command writes to result.json.
        trace: what it writes to trace.json.
        twin: summary and trace of another training, for its loss and metric.

    Raises:
        MissingDependency: plotly is not installed.
    """
    options, rows = summary["options"], trace["rows"]
    title = f"{options['model']} trained with {options['method']}"
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=muted>{html.escape(summary['class'])}, {summary['steps']:,} steps on "
        f"{html.escape(str(options['data']))}</p>",
        _cards(summary, twin),
        *(f"<p><strong>Note:</strong> {html.escape(w)}</p>" for w in summary["warnings"]),
        "<h2>Training loss</h2>",
        _said_of(twin),
        plot(_losses(rows, twin), "loss"),
    ]
    metric = summary["metric"]
    if metric is not None:
        sections += [f"<h2>{html.escape(metric['name'].capitalize())} after every epoch</h2>",
                     plot(_metrics(summary, twin), "metric")]  # fmt: skip
    if trace["names"] and rows:
        sections += [
            "<h2>Sparsity of each tensor over the training</h2>",
            plot(_layers(trace), "layers"),
            "<h2>Mask churn</h2>",
            f"<p class=muted>Of the weights kept at a step, the share that was masked {_ago(trace)}"
            "; and the share of all weights that has been kept at any time so far.</p>",
            plot(_churn(rows), "churn"),
        ]
    if trace["names"] and rows and "flips" in rows[0]:
        sections += [
            "<h2>Mask flips</h2>",
            f"<p class=muted>Of all weights, the share whose mask differs from that {_ago(trace)}, "
            "and from the first one.</p>",
            plot(_flips(rows), "flips"),
        ]
    if summary["tensors"]:
        sections += ["<h2>Every tensor</h2>", _table(summary["tensors"])]
    sections.append(f"<p class=muted>{html.escape(versions(summary['machine']))}</p>")
    document(path, title, sections)


def _cards(summary: Mapping[str, Any], twin: Any) -> str:
    cards = [(f"{summary['sparsity']:.1%}", "of the masked tensors' weights are zero")]
    metric = summary["metric"]
    if metric is not None:
        unit = f" {metric['unit']}" if metric["unit"] else ""
        other = None if twin is None else twin[0]["metric"]
        beside = ""
        if other is not None and other["name"] == metric["name"]:
            beside = f", twin {other['after']:.4g}{unit}"
        elif metric["before"] is not None:
            beside = f", before {metric['before']:.4g}{unit}"
        cards.append((f"{metric['after']:.4g}{unit}", metric["name"] + beside))
    seconds = sum(row["seconds"] for row in summary["history"])
    cards.append((f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min", "to train"))
    inner = "".join(
        f"<div class=card><b>{html.escape(v)}</b><span>{html.escape(t)}</span></div>"
        for v, t in cards
    )
    return f"<div class=cards>{inner}</div>"


def _said_of(twin: Any) -> str:
    if twin is None:
        return ""
    options = twin[0]["options"]
    words = f"The twin is {options['model']} trained with {options['method']}"
    return f"<p class=muted>{html.escape(words)}, {twin[0]['steps']:,} steps.</p>"


def _line(x: list[Any], y: list[Any], name: str, color: str, **more: Any) -> Any:
    import plotly.graph_objects as go

    return go.Scatter(
        x=x, y=y, name=name, mode="lines", line={"color": color, "width": 2, **more},
        hovertemplate=f"{name}<br>step %{{x}}: %{{y:.4g}}<extra></extra>",
    )  # fmt: skip


def _figure(lines: list[Any], y: str) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure(lines)
    figure.update_layout(
        **layout(
            xaxis_title="step", yaxis_title=y, height=340, showlegend=len(lines) > 1,
            legend={"orientation": "h", "y": 1.12, "x": 0},
        )
    )  # fmt: skip
    return figure


def _losses(rows: list[Any], twin: Any) -> Any:
    lines = [_line([r["step"] for r in rows], [r["loss"] for r in rows], "this", COLORS[0])]
    if twin is not None:
        other = twin[1]["rows"]
        lines.append(
            _line([r["step"] for r in other], [r["loss"] for r in other], "twin", COLORS[1],
                  dash="dot")
        )  # fmt: skip
    return _figure(lines, "mean loss")


def _metrics(summary: Mapping[str, Any], twin: Any) -> Any:
    name = summary["metric"]["name"]
    lines = []
    for who, what, color in (("this", summary, COLORS[0]), ("twin", twin and twin[0], COLORS[1])):
        rows = [r for r in what["history"] if name in r] if what else []
        if rows:
            lines.append(_line([r["step"] for r in rows], [r[name] for r in rows], who, color))
            lines[-1].mode = "lines+markers"
    return _figure(lines, name)


def _layers(trace: Mapping[str, Any]) -> Any:
    """One row of the map per tensor, in the order of the model from the top."""
    import plotly.graph_objects as go

    rows, names = trace["rows"], trace["names"]
    values = [[row["tensors"][i] for row in rows] for i in range(len(names))]
    figure = go.Figure(
        go.Heatmap(
            x=[row["step"] for row in rows], y=names, z=values, zmin=0, zmax=1, colorscale=_HEAT,
            colorbar={"title": "zeros", "tickformat": ".0%", "thickness": 12},
            hovertemplate="%{y}<br>step %{x}: %{z:.2%} zero<extra></extra>",
        )
    )  # fmt: skip
    height = min(1400, max(260, 120 + 18 * len(names)))
    figure.update_layout(**layout(xaxis_title="step", height=height))
    figure.update_yaxes(autorange="reversed", automargin=True, dtick=1 if len(names) < 70 else None)
    return figure


def _churn(rows: list[Any]) -> Any:
    steps = [row["step"] for row in rows]
    lines = [
        _line(steps, [row["churn"] for row in rows], "new since the look before", COLORS[0]),
        _line(steps, [row["explored"] for row in rows], "kept at any time", COLORS[2], dash="dot"),
        _line(steps, [1 - row["sparsity"] for row in rows], "kept now", COLORS[6], dash="dash"),
    ]
    figure = _figure(lines, "share of weights")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def _flips(rows: list[Any]) -> Any:
    steps = [row["step"] for row in rows]
    lines = [
        _line(steps, [row["flips"] for row in rows], "since the look before", COLORS[0]),
        _line(steps, [row["moved"] for row in rows], "since the first", COLORS[2], dash="dot"),
    ]
    figure = _figure(lines, "share of weights")
    figure.update_yaxes(tickformat=".1%", rangemode="tozero")
    return figure


def _ago(trace: Mapping[str, Any]) -> str:
    return "one step earlier" if trace["every"] == 1 else f"{trace['every']} steps earlier"


def _table(tensors: Mapping[str, float]) -> str:
    body = "".join(
        f"<tr><td>{html.escape(name)}<td>{value:.2%}</tr>" for name, value in tensors.items()
    )
    return f"<div class=scroll><table><tr><th>tensor<th>sparsity</tr>{body}</table></div>"
