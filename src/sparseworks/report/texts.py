"""Texts of two models side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

__all__ = ["TEXT_STYLE", "side_by_side"]

TEXT_STYLE = """
.texts{white-space:normal;table-layout:fixed}
.texts td{white-space:pre-wrap;text-align:left;vertical-align:top;overflow-wrap:anywhere}
.texts th{text-align:left}
"""


def side_by_side(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The section of a page: prompts, and what the dense and the pruned model say after each.

    Args:
        rows: of `prompt`, `dense` and `pruned`; none: no section.
    """
    if not rows:
        return []
    same = sum(r["dense"] == r["pruned"] for r in rows)
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(r[k])}" for k in ("prompt", "dense", "pruned"))
        for r in rows
    )
    return [
        "<h2>What it says</h2>",
        "<p class=muted>Held-out text, continued by the likeliest token each time. "
        f"{same} of {len(rows)} continuations are the same.</p>",
        "<div class=scroll><table class=texts><tr><th>held-out text<th>dense<th>pruned</tr>"
        f"{cells}</table></div>",
    ]
