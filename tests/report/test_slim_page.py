"""The page of a slimming says what the result says, and names are escaped."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseworks.report.slim import write_slim
from sparseworks.weights.structured.result import SlimResult, Width


def summary(**more: object) -> dict[str, object]:
    result = SlimResult(
        "group-norm", {}, (Width("a<b>.weight axis 0", 64, 16, 2),),
        {"a<b>.weight": ((64, 8), (16, 8))}, (), {"num_hidden_layers": 3}, (4e6, 1e6),
        (1000, 250), blocks=("layers.2",), warnings=("left whole: odd",),
    )  # fmt: skip
    return {
        "model": "mine",
        "class": "Net",
        "seconds per call": {"torch": [0.004, 0.001]},
        "result": result.to_dict(),
        "command": "sparseworks slim mine --flops 0.25",
        "machine": {"cpu": "test"},
        **more,
    }


def test_the_page_holds_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    write_slim(tmp_path / "report.html", summary())
    page = (tmp_path / "report.html").read_text()
    wanted = ["25.0%", "4.00x", "64 x 8", "16 x 8", "layers.2", "num_hidden_layers", "left whole"]
    assert [w for w in wanted if w not in page] == []
    assert "sparseworks slim mine --flops 0.25" in page
    body = page[page.index("<body>") :]
    assert "a&lt;b&gt;.weight" in body and "<td>a<b>" not in body
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
