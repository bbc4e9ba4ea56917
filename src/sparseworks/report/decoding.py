"""The picture of decoding: perplexity against tokens a second, bytes as area."""

from __future__ import annotations

import math
from typing import Any

from sparseworks.report.page import COLORS

__all__ = ["decoding_figure"]

_COLOURS = dict(zip(("ours", "llama.cpp", "onnxruntime-genai", "transformers"), COLORS))
_LARGEST = 60  # pixels across


def decoding_figure(result: dict[str, Any]) -> Any:
    """A Plotly figure of what `sparseworks bench --decode` measured; without perplexities bars."""
    import plotly.graph_objects as go

    rows = result["rows"]
    figure = go.Figure()
    told = bool(rows) and all("perplexity" in row for row in rows)
    most = max((row["bytes"] for row in rows), default=1)
    for family, colour in _COLOURS.items():
        mine = [r for r in rows if r["candidate"].startswith(family)]
        if not mine:
            continue
        speed = [r["decode_tokens_per_second"] for r in mine]
        names = [r["candidate"] for r in mine]
        if told:
            size = [_LARGEST * math.sqrt(r["bytes"] / most) for r in mine]
            figure.add_scatter(
                x=speed, y=[r["perplexity"] for r in mine], mode="markers+text", text=names,
                textposition="top center", name=family,
                marker={"size": size, "color": colour, "opacity": 0.6},
                customdata=[r["bytes"] / 1e6 for r in mine],
                hovertemplate="%{text}<br>%{x:.1f} tokens/s, perplexity %{y:.2f}, "
                "%{customdata:.1f} MB<extra></extra>",
            )  # fmt: skip
        else:
            figure.add_bar(x=speed, y=names, orientation="h", name=family, marker_color=colour)
    machine = result["machine"]
    figure.update_layout(
        title=f"{result['model']}: decoding ({machine['cpu']}, {machine['threads']} threads)"
        + (", area = bytes" if told else ""),
        xaxis_title="tokens a second", template="plotly_white",
    )  # fmt: skip
    if told:
        figure.update_yaxes(title="perplexity (lower is better)", type="log")
    return figure
