"""The report: self-contained, and drawn by a real browser without errors."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.report.page import write_report

pytest.importorskip("plotly")


@pytest.fixture
def page(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 10))
    result = sw.prune(model, "wanda", sparsity=0.5, data=[torch.randn(8, 96)])
    summary = {
        "model": "a <b>model</b>", "class": "Sequential", "parameters": 8570,
        "dense_bytes": 34280, "file_bytes": 20000, "command": "sparseworks prune x",
        "metrics": [{"name": "accuracy", "unit": "%", "higher_is_better": True,
                     "before": 90.0, "after": 88.0}],
        "result": result.to_dict(), "machine": {"cpu": "test"},
    }  # fmt: skip
    path = tmp_path / "report.html"
    write_report(path, summary, model)
    return path


def test_it_says_everything_and_loads_nothing(page):
    text = page.read_text()
    body = text[text.index("<body>") :]
    for piece in ("50.0%", "88 %", "0.weight", "sparseworks prune x", "left dense", "output head"):
        assert piece in body
    assert "<b>model</b>" not in body and "&lt;b&gt;model" in body
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?(https?:)?//", text)
    assert [p.name for p in page.parent.iterdir()] == ["report.html"]


def test_a_browser_draws_it(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=10000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.count("main-svg") >= 4  # every plot was drawn
    assert "Uncaught" not in done.stderr
