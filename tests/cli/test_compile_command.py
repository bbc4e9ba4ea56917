"""`sparseworks compile` and `sparseworks bench` on small models."""

from __future__ import annotations

import json

import pytest
import torch

import sparseworks as sw
from sparseworks.cli import main
from sparseworks.kernels.native import available

FACTORY = """
from torch import nn
def make():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4))
"""


@pytest.fixture
def model(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    return f"{tmp_path / 'net.py'}:make"


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.skipif(not available(), reason="the native kernels are not built")
def test_a_pruned_checkpoint_becomes_a_plan(model, tmp_path, capsys, monkeypatch):
    from sparseworks.cli.loading import load_model
    from sparseworks.engine import compiling

    monkeypatch.setattr(compiling, "interleaved_ms", lambda *runs: [2.0, 1.0][: len(runs)])
    net = load_model(model).model
    sw.prune(net, "magnitude", sparsity=0.7, include="*")
    sw.save(net, tmp_path / "net.safetensors")
    out = tmp_path / "new" / "folder" / "net.plan"
    code = run("compile", model, "--weights", tmp_path / "net.safetensors", "--input-shape", 3, 16,
               16, "--batch", 4, "--out", out)  # fmt: skip
    text = capsys.readouterr().out
    assert code == 0 and "runs as program" in text and "load_compiled" in text
    assert "16x3x3x3" in text
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(sw.load_compiled(out)(x), net(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("json_asked", [False, True])
def test_where_torch_is_fastest_there_is_no_file(model, tmp_path, capsys, monkeypatch, json_asked):
    from sparseworks.engine import compiling

    monkeypatch.setattr(compiling, "interleaved_ms", lambda *runs: [1.0, 2.0, 3.0][: len(runs)])
    out = tmp_path / "new" / "net.plan"
    more = ["--json"] if json_asked else []
    assert run("compile", model, "--input-shape", 3, 16, 16, "--out", out, *more) == 1
    said, error = capsys.readouterr()
    assert error.count("\n") == 1 and str(out) in error
    assert "nothing was written" in error and "torch 1 ms" in error and "more zeros" in error
    assert not out.parent.exists()
    if json_asked:
        assert json.loads(said)["kind"] == "torch" and json.loads(said)["out"] is None
    else:
        assert "runs as torch" in said and "wrote" not in said


def test_what_runs_is_said_as_json(model, capsys):
    assert run("compile", model, "--input-shape", 3, 16, 16, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] in ("program", "layers", "torch") and said["milliseconds"]["torch"] > 0


@pytest.mark.parametrize(
    "arguments, what",
    [
        ([], "no model given"),
        (["MODEL"], "give --input-shape"),
        (["MODEL", "--input-shape", "3", "0", "4"], "at least 1"),
        (["MODEL", "--input-shape", "4", "8", "8"], "does not fit the model"),
        (["MODEL", "--input-shape", "3", "8", "8", "--out", f"{__file__}/x"], "is not a folder"),
        (["MODEL", "--input-shape", "3", "8", "8", "--threads", "0"], "threads=0"),
    ],
)
def test_compile_refuses(model, capsys, arguments, what):
    assert run("compile", *[model if a == "MODEL" else a for a in arguments]) == 1
    error = capsys.readouterr().err
    assert what in error and error.count("\n") == 1


def test_bench_writes_a_table_and_a_plot(model, tmp_path, capsys):
    out = tmp_path / "bench"
    code = run("bench", model, "--input-shape", 3, 16, 16, "--sparsity", "0.8", "--batch", 1, 3,
               "--peers", "torch", "--repeat", 3, "--out", out)  # fmt: skip
    assert code == 0 and "median" in capsys.readouterr().out
    result = json.loads((out / "bench.json").read_text())
    rows = [r for r in result["rows"] if r["candidate"] == "torch"]
    assert [(r["sparsity"], r["batch"]) for r in rows] == [(0.8, 1), (0.8, 3)]
    assert all(r["p10_ms"] <= r["median_ms"] <= r["p90_ms"] for r in result["rows"])
    assert len((out / "bench.csv").read_text().splitlines()) == 1 + len(result["rows"])
    assert "samples a second" in (out / "bench.html").read_text()


@pytest.mark.skipif(not available(), reason="the native kernels are not built")
def test_int8_is_timed_beside_others(model, capsys):
    shape = ("--input-shape", 3, 16, 16, "--dtype", "int8", "--json")
    assert run("compile", model, *shape) == 0
    assert "program, int8" in json.loads(capsys.readouterr().out)["milliseconds"]
    peers = ("torch", "torch.compile", "onnxruntime", "openvino")
    assert run("bench", model, *shape, "--peers", *peers, "--repeat", 2) == 0
    result = json.loads(capsys.readouterr().out)
    assert "torch" in {row["candidate"] for row in result["rows"]}
    assert "torch.compile: fp32 or bf16" in result["notes"]
    assert any("openvino: no" in note for note in result["notes"])


@pytest.mark.parametrize(
    "arguments, what",
    [
        (["--peers", "tensorrt"], "not ['tensorrt']"),
        (["--dtype", "fp8"], "fp32, bf16 or int8"),
        (["--dtype", "fp16"], "fp32, bf16 or int8"),
        (["--repeat", "0"], "at least 1"),
        (["--weights", "x.safetensors", "--sparsity", "0.5"], "leave --sparsity out"),
    ],
)
def test_bench_refuses(model, capsys, arguments, what):
    assert run("bench", model, "--input-shape", "3", "8", "8", *arguments) == 1
    error = capsys.readouterr().err
    assert what in error and error.count("\n") == 1
