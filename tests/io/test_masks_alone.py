"""Masks in a file of their own: a bit a weight, from one task to the next."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError, InvalidArgument


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 5)
    )


def learned(model, task, prior=None):
    """MaskLLM for some steps on data of its own; the masks."""
    job = sw.transform(model, "maskllm", steps=12, include="*", exclude="4", prior=prior, alpha=3.0)
    optimizer = torch.optim.Adam(job.parameter_groups(), lr=0.1)
    job.attach(optimizer)
    generator = torch.Generator().manual_seed(task)
    x, y = torch.randn(64, 64, generator=generator), torch.randint(5, (64,), generator=generator)
    model.train()
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) + job.penalty()
        loss.backward()
        optimizer.step()
    job.finish()
    return sw.masks(model)


def test_masks_of_several_tasks_over_one_set_of_weights(tmp_path):
    base = net()
    records = {}
    for task in (1, 2):
        model = copy.deepcopy(base)
        records[task] = learned(model, task)
        size = sw.save_masks(model, tmp_path / f"{task}.safetensors")
        weights = 64 * 48 + 48 * 40
        assert weights // 8 <= size <= weights // 8 + 500
    assert any(not torch.equal(records[1][n], records[2][n]) for n in records[1])
    for task, record in records.items():
        found = sw.load_masks(tmp_path / f"{task}.safetensors", base)
        assert found.method == "maskllm" and set(found) == set(record)
        assert all(torch.equal(found[n], record[n]) for n in record)
        assert all(found.entry(n).pattern == "2:4" for n in record)
        model = copy.deepcopy(base)
        found.apply(model)
        sw.attach(model, found)
        assert sw.masks(model).violations(model) == {}
    assert sw.masks(base) is None


def test_one_task_starts_from_the_mask_of_another(tmp_path):
    base = net()
    first = copy.deepcopy(base)
    sw.save_masks(learned(first, 1), tmp_path / "m.safetensors")
    prior = sw.load_masks(tmp_path / "m.safetensors", base)
    job = sw.transform(copy.deepcopy(base), "maskllm", steps=1, include="*", exclude="4",
                       prior=prior, alpha=20.0)  # fmt: skip
    job.finish()
    assert all(torch.equal(job.masks[n], prior[n]) for n in prior)
    again = learned(copy.deepcopy(base), 2, prior)
    assert any(not torch.equal(again[n], prior[n]) for n in prior), (
        "the second task learned nothing"
    )


def test_what_is_no_mask_of_this_model_is_refused(tmp_path):
    model = net()
    with pytest.raises(InvalidArgument, match="no masks"):
        sw.save_masks(model, tmp_path / "m.safetensors")
    sw.prune(model, "magnitude", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="safetensors"):
        sw.save_masks(model, tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())
    path = tmp_path / "m.safetensors"
    sw.save_masks(model, path)
    with pytest.raises(CheckpointError, match="not a mask of this model"):
        sw.load_masks(path, nn.Sequential(nn.Linear(64, 47)))
    with pytest.raises(CheckpointError, match="no such file"):
        sw.load_masks(tmp_path / "n.safetensors", model)
    sw.save(model, tmp_path / "weights.safetensors", signed_zeros=False)
    with pytest.raises(CheckpointError, match="not a mask"):
        sw.load_masks(tmp_path / "weights.safetensors", model)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError):
        sw.load_masks(path, model)
