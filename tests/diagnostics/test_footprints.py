"""What a model takes, against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.diagnostics.footprints import Yardstick


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 10)).eval()


def test_masks_cuts_and_integers_by_one_measure(net: nn.Module, tmp_path: Path) -> None:
    example = torch.randn(4, 32)
    measure = Yardstick(net, example)
    whole = measure(net)
    assert whole["sparsity"] == 0 and whole["flops"] == 2 * (32 * 48 + 48 * 10)
    pruned = sw.prune(net, "magnitude", sparsity=0.75, copy=True).model
    found = measure(pruned)
    assert found["sparsity"] == 0.75  # the head is no prunable weight
    assert found["flops"] == 2 * (32 * 48 / 4 + 48 * 10)
    sw.save(pruned, path := tmp_path / "pruned.safetensors")
    assert found["bytes"] == path.stat().st_size < whole["bytes"]
    slim = sw.slim(net, example, flops=0.5, copy=True)
    width = slim.model[0].weight.shape[0]
    found = measure(slim.model)
    assert found["sparsity"] == 1 - width / 48 and found["flops"] == 2 * (32 * width + width * 10)
    rounded = sw.quantize(net, "rounding", bits=3, group=16, copy=True).model
    found, left = measure(rounded), int(rounded[0].weight.count_nonzero())
    assert left < 32 * 48  # small ones are rounded to 0
    assert found["sparsity"] == 1 - left / (32 * 48) and found["bytes"] < whole["bytes"]
    assert found["flops"] == 2 * (left + 48 * 10)
    both = sw.quantize(pruned, "rounding", bits=3, group=16, copy=True).model
    assert measure(both)["sparsity"] >= 0.75 and measure(both)["bytes"] < measure(pruned)["bytes"]


def test_only_what_is_meant_counts(net: nn.Module) -> None:
    net[0].weight.data[:24] = 0
    for patterns, sparsity in ((((), ()), 0.5), ((("0.*", "2.*"), ()), 24 * 32 / (48 * 42))):
        assert Yardstick(net, None, *patterns)(net) == {
            "sparsity": pytest.approx(sparsity), "bytes": Yardstick(net)(net)["bytes"]
        }  # fmt: skip


def test_time_is_taken_beside_the_dense_model(net: nn.Module) -> None:
    net.train()
    found = Yardstick(net, torch.randn(1, 32), repeat=1)(net)
    assert found["latency_ms"] > 0 and found["runs_as"] in ("program", "layers", "torch")
    assert found["speedup"] == found["torch_ms"] / found["latency_ms"]
    assert net.training
