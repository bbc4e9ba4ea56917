"""The figures of a training in the trackers' own files, read back by the trackers' own readers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, MissingDependency
from sparseworks.training.logs import TRACKERS, figures_of
from tracked import READERS


def train(folder, tracker, first, last, parts=None):
    """A sparse training that logs, or the second half of one."""
    if parts is None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = sw.sparsify(model, optimizer, "set", sparsity=0.5, steps=12, every=2, seed=1)
        parts = model, optimizer, run, sw.Trace(run, every=3)
    model, optimizer, _, trace = parts
    x, y = torch.randn(6, 8), torch.arange(6) % 4
    with sw.open_log(tracker, folder=folder, about={"method": "set"}, step=first) as trace.log:
        for step in range(first + 1, last + 1):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            trace.look(step, loss.detach())
    return parts


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_trace_is_what_the_tracker_shows(tracker, tmp_path, monkeypatch):
    pytest.importorskip(tracker)
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "run"
    parts = train(folder, tracker, 0, 6)
    train(folder, tracker, 6, 12, parts)  # the training goes on, in the same run of the tracker
    shown = READERS[tracker](folder)
    wanted = {}
    for row in parts[3].rows:
        for name, value in figures_of(row, parts[3].names).items():
            wanted.setdefault(name, []).append((row["step"], value))
    assert [step for step, _ in shown["loss"]] == [3, 6, 9, 12]
    assert {"loss", "masks/sparsity", "masks/flips", "sparsity/0.weight"} <= shown.keys()
    assert any(flips > 0 for _, flips in shown["masks/flips"])
    assert shown.keys() == wanted.keys()
    for name, values in wanted.items():
        assert shown[name] == [(s, pytest.approx(v, rel=1e-6)) for s, v in values], name


def test_what_is_not_there_is_named_and_nothing_is_made(tmp_path, monkeypatch):
    with pytest.raises(InvalidArgument, match="no tracker 'tensorbord'; use some of tensorboard"):
        sw.open_log("tensorbord", folder=tmp_path / "a")
    find = __import__("importlib").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "mlflow" else find(n))
    with pytest.raises(MissingDependency, match=r"mlflow-skinny: pip install 'sparseworks\[track"):
        sw.open_log("mlflow", folder=tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_no_tracker_is_imported_before_it_is_asked_for():
    code = (
        "import sys, sparseworks.training.logs, sparseworks.training.watching as watching; "
        "watching.Trace(None); "
        "sys.exit(any(m in sys.modules for m in ('tensorboard', 'wandb', 'mlflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
