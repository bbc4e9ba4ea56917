"""Commands where nothing optional is installed: all but the page is written."""

from __future__ import annotations

import json
import sys

import pytest

from sparseworks.cli import main

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

def zeros(model):
    return float((model[1].weight == 0).float().mean())
"""
BLOCKED = ("plotly", "transformers", "yaml", "tensorboard", "wandb", "mlflow", "onnx")


@pytest.fixture
def work(tmp_path, monkeypatch):
    for name in BLOCKED:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def test_prune_writes_the_checkpoint_without_its_page(work, capsys):
    words = ["prune", "net.py:make", "--method", "magnitude", "--sparsity", "0.5", "--out", "out"]
    assert main(words) == 0
    assert "result.json" in capsys.readouterr().out
    assert sorted(p.name for p in (work / "out").iterdir()) == [
        "model.safetensors", "options.json", "result.json"
    ]  # fmt: skip


def test_compare_writes_its_tables_without_the_plot(work, capsys):
    words = ["compare", "net.py:make", "--methods", "magnitude", "random", "--sparsities", "0.5",
             "--metric", "net.py:zeros", "--out", "out"]  # fmt: skip
    assert main(words) == 0
    assert "compare.html" not in capsys.readouterr().out
    assert len(json.loads((work / "out" / "compare.json").read_text())["rows"]) == 2
    assert not (work / "out" / "compare.html").exists()


def test_bench_writes_its_figures_without_the_plot(work):
    words = ["bench", "net.py:make", "--input-shape", "64", "--sparsity", "0.9", "--peers", "torch",
             "--repeat", "1", "--out", "out"]  # fmt: skip
    assert main(words) == 0
    assert json.loads((work / "out" / "bench.json").read_text())["rows"]
    assert not (work / "out" / "bench.html").exists()
