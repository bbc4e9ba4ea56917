"""`sparseworks tickets`: what it writes, that a kill costs one training, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import sparseworks as sw
from sparseworks.cli import main

NET = """
import os, time
import torch
from torch import nn

class Slow(nn.Module):
    def forward(self, x):
        time.sleep(float(os.environ.get("NAP", "0")))
        return x

def make():
    return nn.Sequential(
        Slow(), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(216, 16), nn.ReLU(), nn.Linear(16, 10))
"""
COMMON = ["--data", "digits", "--samples", "300", "--epochs", "2", "--batch-size", "30", "--lr",
          "0.05", "--sparsity", "0.8", "--option", "rounds=2"]  # fmt: skip


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("tickets") / "net.py"
    path.write_text(NET)
    return f"{path}:make"


@pytest.fixture(scope="module")
def made(net, tmp_path_factory):
    """The factory's module, and the folder of a whole experiment."""
    from sparseworks.diagnostics.metrics import load_function

    out = tmp_path_factory.mktemp("made") / "out"
    arguments = [net, *COMMON, "--option", "rounds=2", "rewind=0.2", "controls=true",
                 "--eval-data", "digits", "--out", str(out)]  # fmt: skip
    assert main(["tickets", *arguments]) == 0
    return load_function(net), out, arguments


def test_the_folder_holds_the_ticket_and_how_it_was_found(made):
    factory, out, _ = made
    model = sw.load(out / "model.safetensors", factory())
    record = sw.masks(model)
    assert record.violations(model) == {} and record.sparsity() == pytest.approx(0.8, abs=1e-3)
    result = json.loads((out / "result.json").read_text())
    runs = result["experiment"]["runs"]
    assert list(runs) == [
        "dense", "rewind point", "level 0", "level 1", "level 2", "new values",
        "same masks, new values", "random masks, same values",
    ]  # fmt: skip
    assert {p.name for p in (out / "runs").iterdir() if p.is_dir()} == {
        r["run"] for r in runs.values()
    }
    assert runs["level 2"]["sparsity"] == result["sparsity"] == record.sparsity()
    assert runs["level 1"]["first_step"] == round(0.2 * 2 * (270 // 30))
    assert result["metric"]["name"] == "accuracy" and 0 < result["metric"]["after"] <= 100
    page = (out / "report.html").read_text()
    assert "plot-curve" in page and "random masks, same values" in page


def test_what_is_finished_is_shown_again_and_not_trained(made, capsys):
    _, out, arguments = made
    before = (out / "result.json").stat().st_mtime_ns
    assert main(["tickets", "--resume", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert main(["tickets", *arguments]) == 1  # it exists
    assert "already exists" in capsys.readouterr().err
    assert main(["tickets", "--resume", "--epochs", "3", "--out", str(out)]) == 1
    assert "--epochs 2" in capsys.readouterr().err
    assert (out / "result.json").stat().st_mtime_ns == before


def test_a_soup_from_a_trained_model(made, net, tmp_path):
    factory, out, _ = made
    soup = tmp_path / "soup"
    code = main(["tickets", net, *COMMON[:-2], "--method", "soup", "--option", "phases=1",
                 "copies=2", "merge=greedy", "--start", str(out / "model.safetensors"),
                 "--out", str(soup), "--sparsity", "0.9"])  # fmt: skip
    assert code == 0
    before = sw.masks(sw.load(out / "model.safetensors", factory()))
    after = sw.masks(sw.load(soup / "model.safetensors", factory()))
    assert all(bool((after[n] <= before[n]).all()) for n in after)
    assert after.sparsity() == pytest.approx(0.9, abs=1e-3)


def test_kill_and_resume_gives_the_same_ticket(net, tmp_path):
    """SIGKILL in the middle of a training; finished ones are not trained again."""
    command = [sys.executable, "-m", "sparseworks.cli", "tickets"]
    arguments = [net, *COMMON, "--option", "rounds=2", "rewind=0.2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["tickets", *arguments, "--out", str(whole)]) == 0
    child = subprocess.Popen(
        [*command, *arguments, "--out", str(killed)], env={**os.environ, "NAP": "0.02"},
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 120
    runs = killed / "runs"
    while not (runs.is_dir() and len(list(runs.glob("*/run.json"))) >= 2):
        assert child.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = {p: p.stat().st_mtime_ns for p in runs.glob("*/run.json")}
    assert 2 <= len(kept) < 4 and not (killed / "result.json").exists()
    assert main(["tickets", *arguments, "--out", str(killed)]) == 1  # it says --resume
    assert main(["tickets", "--resume", "--out", str(killed)]) == 0
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    a, b = (p / "model.safetensors" for p in (whole, killed))
    assert a.read_bytes() == b.read_bytes()


def test_refusals_leave_nothing_behind(net, tmp_path, capsys):
    out = tmp_path / "out"
    for arguments, message in (
        (["--out", str(out)], "no model given"),
        ([net, "--out", str(out)], "no --data given"),
        ([net, *COMMON], "give --out"),
        (
            [net, *COMMON, "--method", "rigl", "--option", "--out", str(out)],
            "is hooked, not driver",
        ),
        ([net, *COMMON, "--holdout", "1", "--out", str(out)], "holdout"),
        ([net, *COMMON, "--schedule", "cosine", "--out", str(out)], "schedule"),
        ([net, *COMMON, "--option", "rewind=2", "--out", str(out)], "rewind=2"),
        (["--resume", "--out", str(out)], "no training to resume"),
    ):
        assert main(["tickets", *arguments]) == 1, arguments
        assert message in capsys.readouterr().err
        assert not out.exists()


def test_the_seed_decides_everything(net, tmp_path):
    outs = [tmp_path / str(i) for i in range(3)]
    for out, seed in zip(outs, "001"):
        torch.manual_seed(int(time.time()))
        short = ["--epochs", "1", "--seed", seed, "--out", str(out)]
        assert main(["tickets", net, *COMMON, *short]) == 0
    first, second, other = ((p / "model.safetensors").read_bytes() for p in outs)
    assert first == second != other
