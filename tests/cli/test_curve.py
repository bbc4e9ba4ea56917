"""`sparseworks curve`: its figures are those of the sorted magnitudes, and they are all written."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from torch import nn

from sparseworks.cli import main

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 10))

def left(model):
    return float(model[1].weight.abs().sum())
"""


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def magnitudes():
    torch.manual_seed(0)
    return nn.Linear(30, 40).weight.detach().abs().flatten().sort().values


def test_the_curve_is_written_and_shown(net, tmp_path, capsys):
    out = tmp_path / "curve"
    code = main(
        ["curve", f"{net}:make", "--metric", f"{net}:left", "--seeds", "0", "1", "--tolerance",
         "0.02", "--include", "1.weight", "--out", str(out), "--sparsities", "0.05", "0.1", "0.3",
         "0.6"]
    )  # fmt: skip
    assert code == 0
    assert "free up to" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        "result.json", "curve.csv", "curve.html", "options.json",
    }  # fmt: skip
    found = json.loads((out / "result.json").read_text())
    weights = magnitudes()
    for curve in found["curves"]:
        drops = [float(weights[: round(s * 1200)].sum() / weights.sum()) for s in
                 curve["sparsities"]]  # fmt: skip
        if curve["method"] == "magnitude":
            assert curve["drops"] == pytest.approx(drops, abs=1e-5)
            free = [s for s, d in zip(curve["sparsities"], drops) if d <= 0.02]
            assert curve["essential"] == max(free) > 0
        else:
            assert curve["essential"] == 0
            assert curve["drops"] == pytest.approx(curve["sparsities"], abs=0.04)
    drawn = [c["values"] for c in found["curves"] if c["method"] == "random"]
    assert len(drawn) == 2 and drawn[0] != drawn[1]
    rows = list(csv.DictReader((out / "curve.csv").open()))
    assert len(rows) == 4 * 5
    body = (out / "curve.html").read_text().partition("<body>")[2]
    assert "random" in body and "http" not in body.replace("http://www.w3.org", "")
    again = main(["curve", "--config", str(out / "options.json"), "--out", str(tmp_path / "b")])
    assert again == 0
    assert (tmp_path / "b" / "curve.csv").read_text() == (out / "curve.csv").read_text()


def test_bad_options_are_one_line(net, tmp_path, capsys):
    base = ["curve", f"{net}:make", "--metric", f"{net}:left"]
    for more, said in (
        (["--methods", "magnitud"], "unknown method"),
        (["--sparsities", "0.5", "0.4", "0.9"], "rise"),
        (["--tolerance", "-1"], "tolerance"),
        (["--out", str(net)], "exists"),
        (["--methods", "rigl"], "not one-shot"),
    ):
        assert main([*base, *more]) == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and said in error[0]
    assert main(["curve"]) == 1
    assert "no model given" in capsys.readouterr().err
