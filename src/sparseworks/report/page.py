"""One self-contained HTML page per run: what was done, what it cost, how to repeat it."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import MissingDependency
from sparseworks.core.masks import masks
from sparseworks.io.atomic import atomic_file
from sparseworks.models.views import View, recorded_views
from sparseworks.report.text import megabytes
from sparseworks.report.texts import TEXT_STYLE, side_by_side

__all__ = ["COLORS", "document", "layout", "plot", "versions", "write_report"]

# apart for all kinds of colour vision, and from white paper
COLORS = ("#0b6e63", "#c2571a", "#2132b2", "#c668b2", "#6b85f9", "#63340d", "#062d33")
_ACCENT, _SOFT = "#0b6e63", "#c9ded9"
_STYLE = """
:root{color-scheme:light dark;--ink:#16211f;--paper:#fbfcfb;--muted:#5d6b68;--line:#d9e2df;
--card:#fff;--accent:#0b6e63}
@media(prefers-color-scheme:dark){:root{--ink:#e4ecea;--paper:#121817;--muted:#93a29e;
--line:#2a3532;--card:#1a2220;--accent:#57c7b6}}
*{box-sizing:border-box}
html{scrollbar-gutter:stable}
body{margin:0 auto;max-width:1080px;padding:40px 24px 64px;background:var(--paper);
color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;text-wrap:balance}
h2{font-size:18px;margin:40px 0 8px}
p{margin:4px 0;max-width:70ch}.muted{color:var(--muted)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;
margin:24px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px 16px}
.card b{display:block;font-size:26px;line-height:1.25;font-variant-numeric:tabular-nums}
.card span{color:var(--muted);font-size:14px}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;
overflow-x:auto;font-size:14px}
.scroll{overflow-x:auto;max-height:420px;overflow-y:auto;border:1px solid var(--line);
border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{position:sticky;top:0;background:var(--card)}
.plot{background:#fff;border:1px solid var(--line);border-radius:8px;padding:4px}
"""


def write_report(path: Path, summary: Mapping[str, Any], model: nn.Module) -> None:
    """Write the page of one pruning run.

    Args:
        path: of the HTML file.
        summary: what `sparseworks prune` writes to result.json.
        model: the pruned model, for the histogram and the mask.

    Raises:
        MissingDependency: plotly is not installed.
    """
    title = f"{summary['model']} pruned with {summary['result']['method']}"
    _plotly()
    document(path, title, _sections(summary, model, title))


def document(path: Path, title: str, sections: list[str], style: str = "") -> None:
    """Write a page with everything it needs inside, atomically; `style` is its own, beside all
    pages'."""
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}{TEXT_STYLE}{style}</style>"
        f"<script>{_plotly()}</script></head><body>{''.join(sections)}</body></html>"
    )
    with atomic_file(path) as file:
        file.write_text(page, encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingDependency("reports need plotly: pip install 'sparseworks[report]'") from None
    script: str = get_plotlyjs()
    return script


def _sections(summary: Mapping[str, Any], model: nn.Module, title: str) -> list[str]:
    result = summary["result"]
    views = recorded_views(model, masks(model) or {})
    shown = max(views, key=lambda v: v.parameter.numel())
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=muted>{html.escape(summary['class'])}, {summary['parameters']:,} parameters, "
        f"{len(result['tensors'])} tensors pruned, {len(result['skipped'])} left dense</p>",
        _cards(summary),
        _warnings(result),
        *side_by_side(summary.get("continuations", ())),
        "<h2>Sparsity of each tensor</h2>",
        plot(_sparsity_figure(result["tensors"]), "sparsity"),
    ]
    if any(t["error"] is not None for t in result["tensors"]):
        sections += [
            "<h2>Reconstruction error of each tensor</h2>",
            "<p class=muted>Squared error of the tensor's output on the calibration inputs, "
            "relative to the dense output.</p>",
            plot(_error_figure(result["tensors"]), "error"),
        ]
    sections += [
        "<h2>Kept weights</h2>",
        plot(_histogram(views), "histogram"),
        f"<h2>Mask of {html.escape(shown.name)}</h2>",
        plot(_mask_figure(shown, model), "mask"),
        "<h2>Every tensor</h2>",
        _table(result),
        "<h2>Repeat it</h2>",
        f"<pre>{html.escape(summary['command'])}</pre>",
        f"<p class=muted>{html.escape(versions(summary['machine']))}</p>",
    ]
    return sections


def _cards(summary: Mapping[str, Any]) -> str:
    result = summary["result"]
    cards = [(f"{result['sparsity']:.1%}", "of the pruned weights are zero")]
    if "file_bytes" in summary:
        dense, packed = summary["dense_bytes"], summary["file_bytes"]
        cards.append((megabytes(packed), f"on disk, dense {megabytes(dense)}"))
    for m in summary["metrics"]:
        unit = f" {m['unit']}" if m["unit"] else ""
        cards.append((f"{m['after']:.4g}{unit}", f"{m['name']}, dense {m['before']:.4g}{unit}"))
    cards.append((f"{result['seconds']:.1f} s", "to prune"))
    inner = "".join(
        f"<div class=card><b>{html.escape(v)}</b><span>{html.escape(t)}</span></div>"
        for v, t in cards
    )
    return f"<div class=cards>{inner}</div>"


def _warnings(result: Mapping[str, Any]) -> str:
    return "".join(f"<p><strong>Note:</strong> {html.escape(w)}</p>" for w in result["warnings"])


def versions(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in machine.items())


def layout(**more: Any) -> dict[str, Any]:
    base = {
        "template": "simple_white",
        "margin": {"l": 60, "r": 20, "t": 16, "b": 50},
        "height": 300,
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "colorway": [_ACCENT],
    }
    return {**base, **more}


def plot(figure: Any, name: str) -> str:
    config = {"displayModeBar": False, "responsive": True}
    div = figure.to_html(
        full_html=False, include_plotlyjs=False, config=config, div_id=f"plot-{name}"
    )
    return f"<div class=plot>{div}</div>"


def _bars(names: list[str], values: list[float], label: str, form: str) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Bar(x=list(range(len(names))), y=values, customdata=names, marker_color=_ACCENT,
               hovertemplate="%{customdata}<br>" + label + " %{y:" + form + "}<extra></extra>")
    )  # fmt: skip
    figure.update_layout(**layout(xaxis_title="tensor, in order", yaxis_title=label, bargap=0.15))
    figure.update_yaxes(tickformat=form)
    return figure


def _sparsity_figure(tensors: list[Any]) -> Any:
    figure = _bars(
        [t["name"] for t in tensors], [t["sparsity"] for t in tensors], "sparsity", ".1%"
    )
    figure.update_yaxes(range=[0, 1])
    return figure


def _error_figure(tensors: list[Any]) -> Any:
    known = [t for t in tensors if t["error"] is not None]
    return _bars([t["name"] for t in known], [t["error"] for t in known], "error", ".3f")


def _histogram(views: list[View]) -> Any:
    import plotly.graph_objects as go

    values = torch.cat([_nonzero(v) for v in views]) if views else torch.zeros(1)
    edge = float(values.abs().quantile(0.999)) if len(values) < 1 << 24 else 1.0
    counts, edges = torch.histogram(values, 121, range=(-edge or -1.0, edge or 1.0))
    centres = (edges[1:] + edges[:-1]) / 2
    figure = go.Figure(
        go.Bar(x=centres.tolist(), y=counts.tolist(), marker_color=_ACCENT,
               hovertemplate="%{x:.4f}: %{y}<extra></extra>")
    )  # fmt: skip
    figure.update_layout(**layout(xaxis_title="weight", yaxis_title="count", bargap=0))
    return figure


def _nonzero(view: View, limit: int = 40_000) -> Tensor:
    flat = view.parameter.detach().cpu().float().flatten()
    flat = flat[:: max(1, len(flat) // (2 * limit))]
    return flat[flat != 0]


def _mask_figure(view: View, model: nn.Module) -> Any:
    """The share of kept weights over the matrix, and its first corner weight by weight."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    record = masks(model)
    assert record is not None
    matrix = view.matrix(record[view.name]).float()
    rows, columns = matrix.shape
    cells = torch.nn.functional.adaptive_avg_pool2d(
        matrix[None, None], (min(96, rows), min(96, columns))
    )[0, 0]
    corner = matrix[:64, :64]
    figure = make_subplots(
        1, 2, subplot_titles=(f"density of all {rows} x {columns}", "first 64 x 64 weights"),
        horizontal_spacing=0.1,
    )  # fmt: skip
    scale = [[0, "#ffffff"], [0.5, _SOFT], [1, _ACCENT]]
    hover = "row %{y}, column %{x}: %{z:.2f}<extra></extra>"
    for place, values in ((1, cells), (2, corner)):
        heat = go.Heatmap(
            z=values.tolist(), colorscale=scale, zmin=0, zmax=1, showscale=place == 1,
            hovertemplate=hover, colorbar={"title": "kept", "x": 0.455, "thickness": 12},
        )  # fmt: skip
        figure.add_trace(heat, 1, place)
        figure.update_yaxes(autorange="reversed", row=1, col=place)
    figure.update_layout(**layout(height=440, margin={"l": 50, "r": 20, "t": 40, "b": 40}))
    return figure


def _table(result: Mapping[str, Any]) -> str:
    head = "<tr><th>tensor<th>shape<th>pattern<th>kept<th>sparsity<th>error</tr>"
    rows = []
    for t in result["tensors"]:
        error = "" if t["error"] is None else f"{t['error']:.4f}"
        shape = " x ".join(map(str, t["shape"]))
        rows.append(
            f"<tr><td>{html.escape(t['name'])}<td>{shape}<td>{html.escape(t['pattern'])}"
            f"<td>{t['kept']:,}<td>{t['sparsity']:.2%}<td>{error}</tr>"
        )
    for name, reason in result["skipped"].items():
        rows.append(
            f"<tr><td>{html.escape(name)}<td colspan=5>left dense: {html.escape(reason)}</tr>"
        )
    return f"<div class=scroll><table>{head}{''.join(rows)}</table></div>"
