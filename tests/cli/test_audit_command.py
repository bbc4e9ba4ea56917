"""`sparseworks audit` on folders that `train`, `tickets` and `prune` really wrote."""

from __future__ import annotations

import json

import pytest

from sparseworks.cli import main

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Dense for one epoch, static and RigL masks for two, a long RigL, tickets, one-shot."""
    root = tmp_path_factory.mktemp("runs")
    (root / "net.py").write_text(NET)
    from PIL import Image

    from sparseworks.data.images import digits

    data = digits()
    for i in range(1000, 1200):  # held out: train sees the first 1000
        place = root / "test" / str(int(data.labels[i]))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.pixels[i, 0].numpy()).save(place / f"{i}.png")
    base = [f"{root}/net.py:make", "--data", "digits", "--samples", "1000", "--batch-size", "50",
            "--no-augment", "--json"]  # fmt: skip
    cases = {"dense": ["dense"], "static": ["static"], "rigl": ["rigl", "--option", "every=4"]}
    train = ["train", *base, "--no-tensorboard", "--method"]
    for name, method in cases.items():
        masked = [] if name == "dense" else ["--sparsity", "0.8"]
        for seed in (0, 1):
            words = [*method, *masked, "--epochs", "2", "--seed", str(seed)]
            assert main([*train, *words, "--out", f"{root}/{name}-{seed}"]) == 0
    assert main([*train, *cases["rigl"], "--sparsity", "0.8", "--epochs", "4",
                 "--out", f"{root}/long"]) == 0  # fmt: skip
    assert main(["tickets", *base, "--sparsity", "0.8", "--epochs", "2", "--option", "rounds=2",
                 "--out", f"{root}/tickets"]) == 0  # fmt: skip
    return root


def audit(capsys, *arguments):
    """The exit code and what --json prints."""
    capsys.readouterr()
    code = main(["audit", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def verdicts(found):
    return {c["name"]: c["verdict"] for c in found["checks"]}


def test_seeds_are_arms_and_costs_are_those_of_the_record(runs, capsys):
    folders = [runs / f"{n}-{s}" for n in ("dense", "static", "rigl") for s in (0, 1)]
    code, found = audit(capsys, *folders)
    assert code == 0
    assert [a["name"] for a in found["arms"]] == ["dense", "static", "rigl"]
    full = 64 * 32 + 32 * 10
    dense, static, rigl = (a["runs"][0] for a in found["arms"])
    assert dense["training_macs"] == 3 * full * 2000
    kept = round(static["inference_macs"])
    assert kept == pytest.approx(0.2 * 64 * 32 + 320, abs=2)
    assert static["training_macs"] == pytest.approx(3 * kept * 2000, rel=1e-6)
    extra = rigl["dense_gradient_steps"] * 50 * (full - kept)
    assert rigl["dense_gradient_steps"] == 7  # every 4 steps of 40 until 3/4 of them
    assert rigl["training_macs"] == pytest.approx(3 * kept * 2000 + extra, rel=1e-6)
    ruled = verdicts(found)
    for rule in ("schedule", "training data", "batch size", "start", "sparsity", "layers",
                 "inference cost", "speed", "wall clock", "kind of method"):  # fmt: skip
        assert ruled[rule] == "fair", (rule, found)
    assert ruled["training cost"] == "unfair"  # the dense gradients of RigL, 13 % here
    assert ruled["seeds"] == "unknown" and ruled["tuning"] == "unknown"


def test_a_longer_schedule_is_flagged_and_strict_says_so(runs, tmp_path, capsys):
    pair = [runs / "static-0", runs / "long"]
    code, found = audit(capsys, *pair)
    assert code == 0 and verdicts(found)["schedule"] == "unfair"
    out = tmp_path / "audit.json"
    assert main(["audit", *map(str, pair), "--strict", "--out", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "the comparison is unfair" in shown and "schedule" in shown
    assert json.loads(out.read_text())["verdict"] == "unfair"
    assert main(["audit", *map(str, pair), "--out", str(out)]) == 1
    assert "already exists" in capsys.readouterr().err


def test_tickets_pay_for_every_round(runs, capsys):
    _, found = audit(capsys, runs / "static-0", runs / "tickets")
    record = found["arms"][1]["runs"][0]
    result = json.loads((runs / "tickets" / "result.json").read_text())
    rounds = [r for r in result["experiment"]["runs"].values() if r["sparsity"] < 0.9]
    assert len(rounds) >= 3
    full, per_epoch = 64 * 32 + 32 * 10, 900 // 50
    assert record["steps"] > 2 * 2 * per_epoch
    assert 3 * full * 50 * 2 * per_epoch < record["training_macs"] < 3 * full * record["samples"]
    ruled = verdicts(found)
    assert ruled["training cost"] == ruled["schedule"] == ruled["training data"] == "unfair"


def test_descriptions_add_what_no_folder_knows(runs, tmp_path, capsys):
    told = [{"folder": str(runs / f"{n}-0"), "trials": 3} for n in ("static", "rigl")]
    path = tmp_path / "told.json"
    path.write_text(json.dumps(told))
    _, found = audit(capsys, path)
    assert verdicts(found)["tuning"] == "fair"
    told[0]["trials"] = 30
    path.write_text(json.dumps(told))
    assert verdicts(audit(capsys, path)[1])["tuning"] == "unfair"


def test_a_score_on_training_data_is_flagged(runs, tmp_path, capsys):
    for method, more in (("dense", []), ("static", ["--sparsity", "0.8"])):
        assert main(["train", f"{runs}/net.py:make", "--data", "digits", "--eval-data", "digits",
                     "--epochs", "1", "--method", method, *more, "--no-augment", "--json",
                     "--no-tensorboard", "--out", str(tmp_path / method)]) == 0  # fmt: skip
    _, found = audit(capsys, tmp_path / "dense", tmp_path / "static")
    [check] = [c for c in found["checks"] if c["name"] == "evaluation"]
    assert check["verdict"] == "unfair" and "trained on" in check["reason"]


def test_one_shot_folders_and_bad_input(runs, tmp_path, capsys):
    for method in ("magnitude", "random"):
        assert main(["prune", f"{runs}/net.py:make", "--method", method, "--sparsity", "0.5",
                     "--out", str(tmp_path / method)]) == 0  # fmt: skip
    _, found = audit(capsys, tmp_path / "magnitude", tmp_path / "random")
    assert verdicts(found)["sparsity"] == "fair" and verdicts(found)["seeds"] == "unknown"
    assert main(["audit"]) == 1 and "no runs given" in capsys.readouterr().err
    assert main(["audit", str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
