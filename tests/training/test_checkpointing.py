"""A training state comes back exactly as it was, and nothing else is read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.training.checkpointing import (
    load_state,
    random_state,
    restore_random,
    save_state,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def test_any_tree_comes_back(tmp_path):
    tree = {
        "numbers": [1, 0.1, -0.0, 1e-320, math.inf, math.nan, True, None, 2**80],
        3: ("tuple", [], {}, ()),
        "text": 'quotes " and ü and \n',
        "tensors": {
            "scalar": torch.tensor(3.5, dtype=torch.float64),
            "empty": torch.empty(0, 4),
            "bool": torch.tensor([True, False]),
            "bf16": torch.randn(3, 5).bfloat16(),
            "images": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            "negative zero": torch.tensor([-0.0]),
        },
        "": {"": [torch.ones(1)]},
    }
    save_state(tmp_path / "state", tree)
    back = load_state(tmp_path / "state")
    assert same(tree, back)
    assert math.copysign(1, back["numbers"][2]) == -1
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad"])
def test_optimizers_and_schedules_go_on_exactly(name, tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 3))
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.05, total_steps=8, cycle_momentum=name != "Adagrad"
        )
        return model, optimizer, schedule

    def train(model, optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
            schedule.step()

    parts = build()
    train(*parts, 3)
    state = {"parts": [p.state_dict() for p in parts], "random": random_state()}
    save_state(tmp_path / "state", state)
    train(*parts, 4)
    again = build()
    back = load_state(tmp_path / "state")
    for part, saved in zip(again, back["parts"]):
        part.load_state_dict(saved)
    restore_random(back["random"])
    train(*again, 4)
    assert same(parts[0].state_dict(), dict(again[0].state_dict()))
    assert parts[2].get_last_lr() == again[2].get_last_lr()


def test_what_is_no_state_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match=r"state\.a\.1: a set"):
        save_state(tmp_path / "state", {"a": [0, {1}]})
    assert list(tmp_path.iterdir()) == []
    save_state(tmp_path / "state", {"a": torch.arange(100)})
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "short").write_bytes(whole[:-7])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "other").write_bytes(whole.replace(b"state 1", b"state 9"))
    for bad in ("short", "empty", "other", "absent"):
        with pytest.raises(CheckpointError, match=bad):
            load_state(tmp_path / bad)


def test_an_interrupted_write_leaves_the_old_state(tmp_path, monkeypatch):
    save_state(tmp_path / "state", {"a": 1})

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("sparseworks.training.checkpointing.write_sealed", broken)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path / "state", {"a": 2})
    assert load_state(tmp_path / "state") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
