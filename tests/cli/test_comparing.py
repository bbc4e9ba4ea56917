"""`compare` over all kinds of methods: its rows, its commands, who shares it, what it refuses."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import tiny_models
from sparseworks.cli import main
from sparseworks.diagnostics.tradeoffs import pareto_front
from sparseworks.models.zoo import CifarResNet

NET = f"{tiny_models.__file__}:net"
DIGITS = ["--metric", "accuracy", "--data", "digits", "--eval-data", "digits",
          "--eval-samples", "64", "--samples", "16"]  # fmt: skip
METHODS = ["wanda", "group-random", "rounding:group=8", "wanda+rounding:group=8",
           "group-norm:params=0.7+magnitude:sparsity=0.5"]  # fmt: skip
SWEPT = ["--sparsities", "0.5", "--flops", "0.6", "--bits", "8", "3"]


def compared(out: Path, *more: str) -> dict:
    assert main(["compare", *more, "--out", str(out)]) == 0
    found: dict = json.loads((out / "compare.json").read_text())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("compared") / "out"
    return compared(out, NET, "--methods", *METHODS, *SWEPT, *DIGITS, "--seeds", "0", "1")


def by_name(found: dict) -> dict[str, dict]:
    return {f"{p['method']} {p['amount']}".strip(): p for p in found["points"]}


def test_every_kind_is_measured_alike(found: dict) -> None:
    points = by_name(found)
    assert [p["family"] for p in found["points"]] == [
        "dense", "pruning", "slimming", "quantization", "quantization",
        "pruning + quantization", "pruning + quantization", "slimming + pruning",
    ]  # fmt: skip
    assert list(found["axes"]) == ["quality", "size", "flops", "sparsity", "seconds"]
    dense = points["dense"]["values"]
    assert dense["sparsity"][0] == 0 and points["dense"]["seeds"] == 1
    assert points["wanda 0.5"]["values"]["sparsity"][0] == pytest.approx(0.5, abs=0.01)
    slim = points["group-random flops=0.6"]["values"]
    assert slim["flops"][0] <= 0.61 * dense["flops"][0] and slim["size"][0] < dense["size"][0]
    three, eight = (points[f"rounding:group=8 bits={b}"]["values"]["size"][0] for b in (3, 8))
    assert three < eight < dense["size"][0]
    assert all(p["seeds"] == 2 for n, p in points.items() if n != "dense")
    whole = points["group-norm:params=0.7+magnitude:sparsity=0.5"]["values"]["sparsity"][0]
    assert whole > 0.5  # what was cut counts too
    # the first convolution has 9 columns, which no group of 8 divides
    assert points["rounding:group=8 bits=8"]["untouched"] == 1 > points["wanda 0.5"]["untouched"]


def test_means_intervals_and_front_follow_from_the_rows(found: dict) -> None:
    for point in found["points"][1:]:
        own = [r for r in found["rows"]
               if (r["method"], r["amount"]) == (point["method"], point["amount"])]  # fmt: skip
        assert [r["seed"] for r in own] == [0, 1]
        for name, (mean, low, high) in point["values"].items():
            values = [r[found["axes"][name]["column"]] for r in own]
            assert mean == pytest.approx(sum(values) / 2) and low <= mean <= high
        assert {r["front"] for r in own} == {point["front"]}
    drawn = [(p["values"]["size"][0], p["values"]["quality"][0]) for p in found["points"]]
    assert [p["front"] for p in found["points"]] == pareto_front(drawn, (False, True))


def test_the_tables_are_written(found: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [NET, "--methods", "rounding:group=8", "--bits", "4", "--seeds", "0", *DIGITS]
    again = compared(out, *words, "--x", "flops", "--y", "sparsity")
    with (out / "compare.csv").open() as file:
        [row] = csv.DictReader(file)
    assert row["command"].startswith("sparseworks quantize") and row["front"] == "True"
    assert (again["x"], again["y"]) == ("flops", "sparsity")
    assert row["accuracy"] == str(again["rows"][0]["accuracy"])


def run(command: str, folder: Path) -> None:
    for part in command.split(" && "):
        words = shlex.split(part)
        assert words[0] == "sparseworks"
        done = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True,
                              text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", ["0", "3"])
@pytest.mark.parametrize(
    "method", ["random", "group-random", "rounding:group=8,zeros=false", "wanda:pattern=row"]
)
def test_the_command_of_a_point_makes_it(
    method: str, seed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = ["--sparsities", "0.6", "--flops", "0.6", "--bits", "3"]
    found = compared(tmp_path / "c", NET, "--methods", method, *swept, *DIGITS, "--seeds", seed)
    point = found["points"][1]
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(point["make"])[1:]) == 0
    [made] = tmp_path.glob("*/**/*.safetensors")
    [row] = found["rows"]
    assert made.stat().st_size == row["bytes"]
    result = json.loads(next(tmp_path.glob("*/result.json")).read_text())
    if point["family"] != "slimming":
        assert result["metrics"][0]["after"] == row["accuracy"]
    else:
        assert result["result"]["flops"][1] / result["options"]["batch_size"] == row["flops"]


def test_methods_of_a_combination_read_what_the_one_before_wrote(tmp_path: Path) -> None:
    model = tmp_path / "resnet.safetensors"
    save_file(CifarResNet(1).state_dict(), model)
    more = ["--methods", "random:sparsity=0.5+rounding:bits=8,group=8", "--metric", "gini"]
    found = compared(tmp_path / "c", str(model), *more, "--seeds", "2")
    run(found["points"][1]["make"], tmp_path)
    [made] = tmp_path.glob("random*bits=8*[!g]/model.safetensors")
    assert made.stat().st_size == found["rows"][0]["bytes"]
    with safe_open(made, "pt") as file:
        assert "sparseworks" in str(file.metadata())


def test_the_command_that_measures_a_point_again(found: dict, tmp_path: Path) -> None:
    point = by_name(found)["wanda+rounding:group=8 0.5 bits=3"]
    assert point["make"] is None  # weights alone do not say what model they are of
    again = compared(tmp_path / "c", *shlex.split(point["measure"])[2:])
    told = by_name(again)["wanda+rounding:group=8 0.5 bits=3"]["values"]
    for name in ("quality", "size", "flops", "sparsity"):
        assert told[name] == point["values"][name]


MEETING = """
import os, time
from pathlib import Path
def here(model):
    place = Path(__file__).parent
    (place / f"here-{os.getpid()}").touch()
    end = time.monotonic() + 600
    while len(list(place.glob("here-*"))) < 2:
        assert time.monotonic() < end, "the other does not come"
        time.sleep(0.02)
    return 1.0
"""


def test_two_processes_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, meeting = tmp_path / "out", tmp_path / "meeting.py"
    meeting.write_text(MEETING)
    words = ["compare", NET, "--methods", "random", "magnitude", "--sparsities", "0.2", "0.5",
             "0.8", "--metric", f"{meeting}:here", "--share", "--out", str(out)]  # fmt: skip
    both = [subprocess.Popen([sys.executable, "-m", "sparseworks", *words]) for _ in range(2)]
    assert [p.wait(900) for p in both] == [0, 0]
    found = json.loads((out / "compare.json").read_text())
    assert len(found["rows"]) == 6 and not (out / "tasks").exists()
    assert main(words) == 1 and "already exists" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "b"), "--force"]) == 1
    assert "--share takes neither" in capsys.readouterr().err


def test_time_is_measured_where_it_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [NET, "--methods", "magnitude", "--sparsities", "0.9", *DIGITS, "--latency"]
    found = compared(out, *words, "--x", "latency", "--batch", "2")
    [row] = found["rows"]
    assert row["speedup"] == row["torch_ms"] / row["latency_ms"]
    assert found["points"][0]["values"]["latency"][0] > 0 and found["x"] == "latency"
    assert "--latency" in found["points"][1]["measure"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "wanda+rouding"], "unknown method 'rouding'"),
        (["--methods", "rigl"], "call sw.sparsify"),
        (["--methods", "wanda", "--x", "latency"], "--x latency: is measured with --latency only"),
        (["--methods", "wanda", "--y", "colour"], "--y colour: one of quality, size"),
        (["--methods", "wanda", "--y", "size"], "are both size"),
        (["--methods", "group-norm", "--flops", "1.5"], "--flops 1.5"),
        (["--methods", "rounding", "--bits", "99"], "bits=99"),
        (["--methods", "wanda", "--latency", "--dtype", "bf16"], "leave --dtype out"),
        (["--methods", "wanda", "--batch", "0"], "at least 1"),
        (["--methods", "wanda", "--sparsities", "half"], "'half'"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(["compare", "none.py:model", *more, "--out", str(out)]) == 1
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_what_a_model_is_called_with_must_be_known(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "flops.py").write_text("def flops(model):\n    return 1.0\n")
    words = ["compare", NET, "--methods", "magnitude", "--sparsities", "0.5", "--metric"]
    assert main([*words, "gini", "--x", "flops"]) == 1
    assert "give --input-shape" in capsys.readouterr().err
    assert main([*words, "gini", "--json"]) == 0
    assert "flops" not in json.loads(capsys.readouterr().out)["axes"]
    assert main([*words, "gini", "--x", "flops", "--input-shape", "1", "8", "8"]) == 0
    assert main([*words, f"{tmp_path / 'flops.py'}:flops"]) == 1
    assert "there is a column of this name" in capsys.readouterr().err
