"""The page of a comparison: pick two things to trade, see the front, take the command."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseworks.diagnostics.tradeoffs import Axis, best_within
from sparseworks.report.page import COLORS, document, versions

__all__ = ["write_comparison"]

_SHARE = 0.01  # of quality that may be lost by the models that the cards name
_SYMBOLS = {
    "dense": "star", "pruning": "circle", "slimming": "square", "quantization": "diamond",
    "pruning + quantization": "triangle-up", "slimming + pruning": "triangle-down",
    "slimming + quantization": "cross", "slimming + pruning + quantization": "x",
}  # fmt: skip
_INK = "#16211f"
_SCRIPT = Path(__file__).with_name("compare.js")
_STYLE = """
.picks{display:flex;flex-wrap:wrap;gap:8px 20px;align-items:center;margin:12px 0}
.picks label{display:inline-flex;gap:6px;align-items:center}
.picks select,.picks button,#chosen button{font:inherit;color:var(--ink);background:var(--card);
border:1px solid var(--line);border-radius:6px;padding:4px 8px;max-width:100%}
fieldset{border:0;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:6px 18px}
legend{float:left;padding:0;margin-right:18px;font-weight:600}
#legend{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;margin:8px 0;padding:0;
font-size:14px}
#legend li{display:inline-flex;gap:6px;align-items:center}
#legend svg,fieldset svg{background:#fff;border-radius:4px}
#plot{outline-offset:2px}:focus-visible{outline:3px solid var(--accent)}
#chosen{border:1px solid var(--line);border-radius:8px;background:var(--card);padding:12px 16px;
margin:12px 0;min-height:9.5em}
#chosen dl{display:flex;flex-wrap:wrap;gap:4px 24px;margin:6px 0}
#chosen dl div{display:flex;gap:6px}#chosen dt{color:var(--muted)}#chosen dd{margin:0;
font-variant-numeric:tabular-nums}
#chosen pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:6px 0;background:var(--paper)}
td button{font:inherit;color:var(--accent);background:none;border:0;padding:0;cursor:pointer;
text-align:left;text-decoration:underline;text-underline-offset:3px}
tr.front td:first-child{font-weight:700}
tr[hidden]{display:none}tr.chosen{background:color-mix(in srgb,var(--accent) 14%,transparent)}
@media(max-width:600px){body{padding:24px 14px 48px}h1{font-size:23px}}
"""


def write_comparison(
    path: Path, found: Mapping[str, Any], *, title: str = "", above: str = "", below: str = ""
) -> None:
    """Write the page of `sparseworks compare`.

    Args:
        path: of the HTML file.
        found: what the command writes to compare.json.
        title: in place of its own.
        above: HTML in place of its cards.
        below: HTML under its table.

    Raises:
        MissingDependency: plotly is not installed.
    """
    metric, points = found["metric"], found["points"]
    title = title or f"What {metric} of {Path(found['model']).name} costs"
    runs, seeds = len(found["rows"]), max((p["seeds"] for p in points), default=1)
    better = "higher" if found["higher_is_better"] else "lower"
    of = "one seed" if seeds == 1 else f"up to {seeds} seeds; bands and bars are 95 % intervals"
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=muted>{html.escape(metric)}, {better} is better, of the dense model "
        f"{found['dense']:.4g}{html.escape(found['unit'])}; {runs} runs, {of}</p>",
        above or _cards(found),
        _controls(found),
        "<div class=plot id=plot tabindex=0 role=group aria-label='The picture. Arrow keys move "
        "through its points; what is chosen is told below.'><div id=picture></div></div>",
        "<ul id=legend aria-label='Methods'></ul>",
        "<div id=chosen aria-live=polite><p class=muted>Point at a model, or go to the picture "
        "and press an arrow key: here is the command that makes it.</p></div>",
        "<h2>Every model</h2><p class=muted>The front is that of the two axes above, among the "
        f"families that are shown; {path.stem}.csv has every run.</p>",
        _table(found),
        below,
        f"<p class=muted>{html.escape(versions(found['machine']))}</p>",
        f"<script type=application/json id=data>{_data(found)}</script>",
        f"<script>{_SCRIPT.read_text(encoding='utf-8')}</script>",
    ]
    document(path, title, sections, style=_STYLE)


def _axes(found: Mapping[str, Any]) -> dict[str, Axis]:
    return {name: Axis(name, **told) for name, told in found["axes"].items()}


def _name(point: Mapping[str, Any]) -> str:
    return f"{point['method']} {point['amount']}".strip()


def _cards(found: Mapping[str, Any]) -> str:
    """The smallest, cheapest and fastest model that loses next to nothing."""
    dense, *others = found["points"]
    cards = []
    for name, word in (("size", "smaller"), ("flops", "fewer FLOPs"), ("speedup", "faster")):
        axis = _axes(found).get(name)
        if axis is None:
            continue
        best = best_within(others, axis, found["dense"], found["higher_is_better"], _SHARE)
        whole, value = dense["values"][name][0], best["values"][name][0] if best else 0.0
        ratio = value if name == "speedup" else whole / value if value else 0.0
        than = "than dense"
        if name == "speedup":
            than = f"than dense in torch (compiled alone {whole:.2f}x)"
        if best is None or ratio <= 1:
            cards.append(("none", f"is {word} {than} within {_SHARE:.0%} of its {found['metric']}"))
        else:
            cards.append(
                (
                    f"{ratio:.2f}x {word}",
                    f"{than}, within {_SHARE:.0%} of its {found['metric']}: {_name(best)}",
                )
            )
    inner = "".join(
        f"<div class=card><b>{html.escape(v)}</b><span>{html.escape(t)}</span></div>"
        for v, t in cards
    )
    return f"<div class=cards>{inner}</div>"


def _controls(found: Mapping[str, Any]) -> str:
    def select(which: str) -> str:
        options = "".join(
            f"<option value={name}{' selected' * (name == found[which])}>"
            f"{html.escape(axis['label'])}</option>"
            for name, axis in found["axes"].items()
        )
        return f"<label>{which} <select id={which}>{options}</select></label>"

    families = list(dict.fromkeys(p["family"] for p in found["points"]))
    boxes = "".join(
        f"<label><input type=checkbox name=family value={html.escape(f, quote=True)!r} checked> "
        f"<svg width=16 height=16 data-symbol={_SYMBOLS.get(f, 'circle')}></svg>"
        f"{html.escape(f)}</label>"
        for f in families
    )
    return (
        f"<div class=picks>{select('x')}{select('y')}"
        "<label><input type=checkbox id=logx> log x</label>"
        "<label><input type=checkbox id=logy> log y</label></div>"
        f"<div class=picks><fieldset><legend>Families</legend>{boxes}</fieldset></div>"
    )


def _table(found: Mapping[str, Any]) -> str:
    axes = found["axes"]
    head = "".join(f"<th>{html.escape(a['label'])}" for a in axes.values())
    rows = "".join(
        f"<tr data-point={i}><td><button type=button>{html.escape(_name(p))}</button>"
        f"<td class=on>{'front' if p['front'] else ''}<td>{html.escape(p['family'])}"
        f"<td>{p['seeds']}"
        + "".join(f"<td>{_cell(p['values'][n], a['scale'])}" for n, a in axes.items())
        + "</tr>"
        for i, p in enumerate(found["points"])
    )
    head = f"<tr><th>model<th>front<th>family<th>seeds{head}</tr>"
    return f"<div class=scroll><table>{head}{rows}</table></div>"


def _cell(value: Sequence[Any], scale: float) -> str:
    mean, low, high = value
    told = f"{mean / scale:.4g}"
    half = 0.0 if low is None else (high - low) / 2 / scale
    return f"{told} &plusmn;{half:.2g}" if half else told


def _data(found: Mapping[str, Any]) -> str:
    """Points, axes and looks for the script; no sign in it can end the element that holds it."""
    methods = [m for m in dict.fromkeys(p["method"] for p in found["points"]) if m != "dense"]
    looks = {
        method: {"color": COLORS[i % len(COLORS)], "open": i >= len(COLORS),
                 "dash": ("solid", "dash", "dot")[i // len(COLORS) % 3]}
        for i, method in enumerate(methods)
    }  # fmt: skip
    looks["dense"] = {"color": _INK, "open": False, "dash": "solid"}
    data = {
        "axes": found["axes"], "points": found["points"], "looks": looks, "symbols": _SYMBOLS,
        "x": found["x"], "y": found["y"], "ink": _INK,
    }  # fmt: skip
    return json.dumps(data).replace("<", "\\u003c")
