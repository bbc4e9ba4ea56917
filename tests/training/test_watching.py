"""The trace of masks: against sets of kept weights counted one by one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.training.checkpointing import load_state, save_state
from sparseworks.training.watching import Trace


def changing(steps, seed=0):
    """Random masks of two tensors, some of them empty."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (7,)}
    for step in range(steps):
        density = 0.0 if step == 4 else float(torch.rand((), generator=g))
        yield {n: torch.rand(s, generator=g) < density for n, s in shapes.items()}


def kept(masks):
    return {(n, i) for n, m in masks.items() for i, k in enumerate(m.flatten().tolist()) if k}


def test_rows_are_what_counting_gives():
    drawn = list(changing(9))
    run = SimpleNamespace(masks=drawn[0])
    trace = Trace(run, every=2)
    first = before = ever = kept(drawn[0])
    for step, masks in enumerate(drawn[1:], 1):
        run.masks = masks
        row = trace.look(step, float(step))
        if step % 2:
            assert row is None
            continue
        now = kept(masks)
        ever = ever | now
        assert row is not None and row["step"] == step and row["loss"] == step - 0.5
        assert row["sparsity"] == pytest.approx(1 - len(now) / 22)
        assert row["churn"] == pytest.approx(len(now - before) / max(1, len(now)))
        assert row["explored"] == pytest.approx(len(ever) / 22)
        assert row["flips"] == pytest.approx(len(now ^ before) / 22)
        assert row["moved"] == pytest.approx(len(now ^ first) / 22)
        assert row["tensors"] == pytest.approx(
            [1 - sum(n == name for n, _ in now) / size for name, size in (("a", 15), ("b", 7))]
        )
        before = now


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_saved_trace_goes_on_exactly(stop, tmp_path):
    drawn = list(changing(9))

    def go(trace, run, first, last):
        for step in range(first, last):
            run.masks = drawn[step]
            trace.look(step, torch.tensor(math.sqrt(step), dtype=torch.float64))

    run = SimpleNamespace(masks=drawn[0])
    whole = Trace(run, 2)
    go(whole, run, 1, 9)
    run.masks = drawn[0]
    parts = Trace(run, 2)
    go(parts, run, 1, stop + 1)
    save_state(tmp_path / "state", parts.state_dict())
    run.masks = drawn[0]
    resumed = Trace(run, 2)
    resumed.load_state_dict(load_state(tmp_path / "state"))
    go(resumed, run, stop + 1, 9)
    assert resumed.report() == whole.report()


def test_gradual_never_churns_and_set_explores():
    for method, rises in (("gradual", False), ("set", True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = sw.sparsify(
            model, optimizer, method, sparsity=0.8, steps=20, every=2, include="*", seed=0
        )
        trace = Trace(run)
        for step in range(1, 21):
            optimizer.zero_grad()
            model(torch.randn(8, 12)).square().mean().backward()
            optimizer.step()
            trace.look(step)
        assert any(row["churn"] > 0 for row in trace.rows) == rises
        assert (trace.rows[-1]["explored"] > trace.rows[0]["explored"]) == rises
        assert trace.rows[-1]["sparsity"] == run.current_sparsity


def test_without_masks_it_follows_the_loss_only():
    trace = Trace(None, 3)
    rows = [trace.look(step, 2.0 * step) for step in range(1, 7)]
    assert [r for r in rows if r] == [{"step": 3, "loss": 4.0}, {"step": 6, "loss": 10.0}]
    assert trace.report()["names"] == []


def test_misuse_is_refused():
    with pytest.raises(InvalidArgument, match="every=0"):
        Trace(None, 0)
    run = SimpleNamespace(masks={"a": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(CheckpointError, match="other tensors"):
        Trace(None).load_state_dict(Trace(run).state_dict())
