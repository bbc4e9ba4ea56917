"""The page of a comparison: self-contained, and its front is that of `pareto_front`."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sparseworks.diagnostics.tradeoffs import AXES, pareto_front
from sparseworks.report.compare import write_comparison

pytest.importorskip("plotly")
HIGHER = {a.name: a.higher_is_better for a in AXES}


def made(names: tuple[str, ...] = ("quality", "size", "latency", "sparsity")) -> dict[str, Any]:
    """Points of whole numbers, so that some are equal on one axis or on both."""
    drawn = random.Random(0)
    families = ("pruning", "slimming", "pruning + quantization")
    points = [
        {
            "method": f"m{i // 4}</script><b>", "amount": f"0.{i}", "family": families[i % 3],
            "line": f"line {i // 4}", "make": None if i == 5 else f"sparseworks prune '{i}<i>'",
            "measure": f"sparseworks compare {i}", "untouched": i % 2, "seeds": 1 + i % 2,
            "values": {n: [v := float(drawn.randint(1, 6)), v - 1 if i % 2 else None,
                           v + 1 if i % 2 else None] for n in names},
            "front": False,
        }
        for i in range(40)
    ]  # fmt: skip
    points[0] |= {"method": "dense", "amount": "", "family": "dense", "line": "", "make": None}
    return {
        "model": "some<model>", "metric": "accuracy", "unit": "%", "higher_is_better": True,
        "dense": points[0]["values"]["quality"][0], "x": "size", "y": "quality",
        "axes": {a.name: {"column": a.name, "label": a.label or "accuracy (%)", "scale": a.scale,
                          "higher_is_better": a.higher_is_better} for a in AXES if a.name in names},
        "points": points, "rows": [{}] * 60, "machine": {"cpu": "test"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "compare.html"
    write_comparison(path, made())
    return path


def test_it_loads_nothing_and_escapes_names(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?(https?:)?//", text)
    body = text[text.index("<body>") :]
    assert body.count("</script>") == 2  # data and script end where they should
    assert "m1</script>" not in body and "some<model>" not in body
    data = json.loads(re.search(r"id=data>(.*?)</script>", body)[1])
    assert data["points"] == made()["points"]
    for control in ("<select id=x>", "<select id=y>", "name=family", "tabindex=0", "aria-live"):
        assert control in body


def test_the_cards_name_what_loses_next_to_nothing(page: Path) -> None:
    found = made()
    dense = found["points"][0]["values"]
    kept = [p for p in found["points"][1:] if p["values"]["quality"][0] >= 0.99 * found["dense"]]
    least = min(p["values"]["size"][0] for p in kept)
    assert f"{dense['size'][0] / least:.2f}x smaller" in page.read_text()


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium here")
    return found


def shown(browser: str, page: Path, view: str, profile: Path) -> str:
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={profile}",
         "--virtual-time-budget=10000", "--dump-dom", f"{page.as_uri()}#{view}"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr and "Uncaught" not in done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("x", "y", "off"),
    [("size", "quality", ""), ("sparsity", "latency", "pruning"), ("sparsity", "quality", "dense")],
)
def test_the_browser_draws_the_front(
    x: str, y: str, off: str, browser: str, page: Path, tmp_path: Path
) -> None:
    text = shown(browser, page, f"x={x}&y={y}&off={off}", tmp_path)
    assert "main-svg" in text
    rows = {
        int(number): (attributes, "front" in (re.search(r'class="([^"]*)"', attributes) or "  ")[1])
        for attributes, number in re.findall(r'<tr ([^>]*data-point="(\d+)"[^>]*)>', text)
    }
    points = made()["points"]
    seen = [i for i, p in enumerate(points) if p["family"] != off]
    assert sorted(i for i, (a, _) in rows.items() if "hidden" not in a) == seen
    drawn = [(points[i]["values"][x][0], points[i]["values"][y][0]) for i in seen]
    front = pareto_front(drawn, (HIGHER[x], HIGHER[y]))
    assert [rows[i][1] for i in seen] == front and 0 < sum(front) < len(front)
    assert len(re.findall(r'<path class="point[ "]', text)) == len(seen)
    for which, name in (("x", x), ("y", y)):
        label = html.escape(made()["axes"][name]["label"])
        assert re.search(rf'class="{which}title"[^>]*>{re.escape(label)}<', text)
