"""`sparseworks slim` end to end, on a model file of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparseworks.cli import main
from sparseworks.models.zoo import CifarResNet
from sparseworks.weights.structured import load_slim

FACTORY = """
import torch
from sparseworks.models.zoo import CifarResNet

def make():
    torch.manual_seed(0)
    return CifarResNet(1).eval()
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(FACTORY)
    return f"{path}:make"


def test_slim_writes_a_model_that_loads(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = main(["slim", model, "--flops", "0.5", "--batch-size", "2", "--out", str(out)])
    assert code == 0
    result = json.loads((out / "result.json").read_text())["result"]
    assert result["flops"][1] <= 0.5 * result["flops"][0]
    page = (out / "report.html").read_text()
    assert f"{result['parameters'][1]:,}" in page and "--flops 0.5" in page
    small = load_slim(out / "model", CifarResNet(1))
    assert sum(p.numel() for p in small.parameters()) == result["parameters"][1]
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert main(["slim", model, "--flops", "0.5", "--out", str(out)]) == 1, "never overwrites"


def test_groups_are_printed_and_nothing_is_cut(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slim", model, "--groups"]) == 0
    assert "layer1.0.conv1.weight axis 0: 1 each" in capsys.readouterr().out


def test_multiples_of_widths_are_given_by_layer(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["slim", model, "--flops", "0.6", "--round-to", "layer2=8,layer3=16", "--json"]
    assert main(words) == 0
    widths = json.loads(capsys.readouterr().out)["result"]["widths"]
    after = {w["name"]: w["after"] for w in widths}
    assert all(w % 8 == 0 for n, w in after.items() if n.startswith("layer2"))
    assert all(w % 16 == 0 for n, w in after.items() if n.startswith("layer3"))


BAD = [
    [],
    ["--flops", "2"],
    ["--flops", "0.5", "--method", "nope"],
    ["--flops", "0.5", "--round-to", "eight"],
    ["--flops", "0.5", "--round-to", "layer9=8"],
]


@pytest.mark.parametrize("words", BAD)
def test_bad_options_are_one_line(
    model: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slim", model, *words]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("sparseworks") and len(error.split("\n")) == 1
