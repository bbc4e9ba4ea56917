"""The page of a benchmark: every figure, in the house's colours."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseworks.report.bench import write_bench
from sparseworks.report.page import COLORS


def row(
    candidate: str, sparsity: float | None, ms: float, ratio: float | None
) -> dict[str, object]:
    return {
        "sparsity": sparsity, "batch": 4, "candidate": candidate, "median_ms": ms, "p10_ms": ms,
        "p90_ms": ms, "ours_is_faster_by": ratio,
    }  # fmt: skip


def test_the_page_holds_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    result = {
        "model": "a<b>", "dtype": "fp32", "notes": ["openvino: <absent>"],
        "machine": {"cpu": "test", "threads": 1},
        "rows": [
            row("ours", None, 2, 1.0), row("t<i>", None, 8, 4.0), row("t<i>", 0.9, 7, None),
        ],
    }  # fmt: skip
    write_bench(tmp_path / "bench.html", result)
    page = (tmp_path / "bench.html").read_text()
    body = page[page.index("<body>") :]
    for piece in ("8.000", "4.00x", "as it is", "90%", "&lt;absent&gt;", "1 thread;", "a&lt;b&gt;"):
        assert piece in body
    assert COLORS[0] in body and COLORS[1] in body and COLORS[2] not in body
    assert "<td>t<i>" not in body
    assert [p.name for p in tmp_path.iterdir()] == ["bench.html"]
