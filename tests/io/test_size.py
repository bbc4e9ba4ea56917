"""What a file weighs, what `inspect` says of it, and what saving costs in memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseworks as sw
from sparseworks.core.masks import Masks
from sparseworks.core.patterns import NM
from sparseworks.io import inspect


def pruned(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> nn.Module:
    model = nn.Linear(columns, rows, bias=False, dtype=dtype)
    drop = torch.randperm(rows * columns)[: int(sparsity * rows * columns)]
    mask = torch.ones(rows * columns, dtype=torch.bool)
    mask[drop] = False
    record = Masks.of({"weight": mask.view(rows, columns)}, "random")
    record.apply(model)
    sw.attach(model, record)
    return model


def test_ninety_percent_sparse_takes_fourteen_percent(tmp_path):
    """10 % of the values and one bit a weight: 13.125 % of fp32."""
    model = nn.Sequential(*[pruned(256, 384, 0.9, torch.float32) for _ in range(3)])
    record = Masks(method="random")
    for i, layer in enumerate(model):
        record = record.with_mask(f"{i}.weight", sw.masks(layer)["weight"])
    sw.attach(model, record)
    info = sw.save(model, tmp_path / "m.safetensors")
    dense = 3 * 256 * 384 * 4
    assert info.masked_ratio == pytest.approx(0.1 + 1 / 32, abs=1e-4)
    assert (tmp_path / "m.safetensors").stat().st_size <= 0.14 * dense


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    sparsity=st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    with_mask=st.booleans(),
)
def test_the_smallest_layout_is_taken(rows, columns, sparsity, dtype, with_mask, tmp_path_factory):
    """Never more than dense (with the mask's bits beside it), never more than the bitmask."""
    folder = tmp_path_factory.mktemp("size")
    model = pruned(rows, columns, sparsity, dtype)
    kept = int(sw.masks(model)["weight"].sum())
    if not with_mask:
        sw.attach(model, None)
    info = sw.save(model, folder / "m.safetensors")
    n, width = rows * columns, dtype.itemsize
    bitmask = math.ceil(n / 8) + kept * width
    dense = n * width + (math.ceil(n / 8) if with_mask and kept < n else 0)
    assert info.tensors[0].nbytes <= min(bitmask, dense) + 128  # a part's cost in the header


def test_two_four_takes_less_than_its_bitmask(tmp_path):
    model = nn.Linear(256, 256, bias=False)
    record = Masks.of({"weight": NM(2, 4).select(model.weight.detach().abs())}, "m", "2:4")
    record.apply(model)
    sw.attach(model, record)
    info = sw.save(model, tmp_path / "m.safetensors")
    assert info.tensors[0].layout == "2:4"
    assert info.tensors[0].nbytes == 256 * 256 * 4 // 2 + 256 * 256 // 4 * 3 // 8


def test_minus_zero_outside_the_mask_costs_a_bit(tmp_path):
    """`weight *= mask` leaves -0.0 behind: it comes back, without storing the values."""
    model = pruned(128, 128, 0.9, torch.float32)
    model.weight.data = torch.randn(128, 128) * sw.masks(model)["weight"]
    info = sw.save(model, tmp_path / "m.safetensors")
    assert info.masked_ratio < 0.1 + 2 / 32
    other = sw.load(tmp_path / "m.safetensors", nn.Linear(128, 128, bias=False))
    assert torch.equal(other.weight.view(torch.int32), model.weight.view(torch.int32))


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_the_cost_of_negative_zeros_is_said_and_can_be_saved(tmp_path, dtype, sparsity, with_mask):
    """What is said to be the cost is what the file shrinks by; it then is that of +0.0."""
    model = pruned(96, 130, sparsity, torch.float32)
    model.weight.data = (torch.randn(96, 130) * sw.masks(model)["weight"]).to(dtype)
    if not with_mask:
        sw.attach(model, None)
    signed = sw.save(model, tmp_path / "signed.safetensors")
    small = sw.save(model, tmp_path / "small.safetensors", signed_zeros=False)
    assert small.signed_zero_bytes == 0 and "-0.0" not in str(small)
    assert (signed.signed_zero_bytes > 0) == (sparsity > 0) == ("-0.0" in str(signed))
    assert small.tensors[0].nbytes == signed.tensors[0].nbytes - signed.signed_zero_bytes
    assert inspect(tmp_path / "signed.safetensors") == signed
    assert signed.to_dict()["signed_zero_bytes"] == signed.signed_zero_bytes
    model.weight.data = torch.where(model.weight.float() == 0, 0.0, model.weight.float()).to(dtype)
    assert small.tensors == sw.save(model, tmp_path / "plus.safetensors").tensors


def test_inspect_tells_what_is_there(tmp_path):
    model = nn.Sequential(pruned(64, 64, 0.75, torch.float32), nn.BatchNorm1d(64))
    sw.attach(model, Masks.of({"0.weight": sw.masks(model[0])["weight"]}, "wanda"))
    saved = sw.save(model, tmp_path / "m.safetensors")
    found = inspect(tmp_path / "m.safetensors")
    assert found == saved
    assert found.kind == "sparseworks" and found.method == "wanda"
    by_name = {t.name: t for t in found.tensors}
    assert by_name.keys() == model.state_dict().keys()
    weight = by_name["0.weight"]
    assert (weight.shape, weight.dtype, weight.layout) == ((64, 64), "float32", "bitmask")
    assert weight.sparsity == weight.mask_sparsity == 0.75
    assert weight.nbytes == 64 * 64 // 8 + 1024 * 4 and weight.dense_bytes == 64 * 64 * 4
    assert by_name["1.weight"].mask_sparsity is None and by_name["1.bias"].sparsity == 1.0
    assert found.file_bytes == (tmp_path / "m.safetensors").stat().st_size
    assert "0.weight" in str(found) and found.to_dict()["tensors"][0]["name"] == "0.weight"


def test_inspect_reads_plain_files(tmp_path):
    model = pruned(64, 64, 0.75, torch.float32)
    sw.export_dense(model, tmp_path / "m.safetensors")
    assert inspect(tmp_path / "m.safetensors").tensors[0].sparsity is None
    found = inspect(tmp_path / "m.safetensors", values=True)
    assert found.kind == "safetensors" and found.tensors[0].sparsity == 0.75


def test_the_dense_export_is_read_by_the_format_s_own_library(tmp_path):
    from safetensors.torch import load_model

    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    sw.export_dense(model, tmp_path / "m.safetensors")
    other = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    other["b"].weight = other["a"].weight
    assert load_model(other, tmp_path / "m.safetensors") == (set(), [])
    assert torch.equal(other["b"].weight, model["a"].weight)
    apart = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    sw.load(tmp_path / "m.safetensors", apart)
    assert torch.equal(apart["b"].weight, model["a"].weight)


PEAK = """
    import sys, torch, sparseworks as sw
    from torch import nn
    from sparseworks.core.masks import Masks

    def resident(key):
        lines = open("/proc/self/status").read().splitlines()
        return int(next(l for l in lines if l.startswith(key)).split()[1]) / 1024

    def build():
        return nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(12)])

    what, path = sys.argv[1:]
    model, small = build(), nn.Linear(64, 64)
    sw.save(small, path + ".warm.safetensors")
    sw.load(path + ".warm.safetensors", small)
    if what == "save":
        record = Masks(method="random")
        for i in range(12):
            record = record.with_mask(f"{i}.weight", torch.rand(2048, 2048) < 0.5)
        record.apply(model)
        sw.attach(model, record)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    sw.save(model, path) if what == "save" else sw.load(path, model)
    print(resident("VmHWM") - before, sum(p.numel() * 4 for p in model.parameters()) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_saving_and_loading_hold_no_second_copy(tmp_path):
    """192 MB of weights, half of them masked: less than half of that on top of the model."""
    source = str(Path(sw.__file__).parents[1])
    for what in ("save", "load"):
        out = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PEAK), what, str(tmp_path / "m.safetensors")],
            env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert out.returncode == 0, out.stderr
        extra, weights = map(float, out.stdout.split())
        assert weights == 192 and extra < 0.5 * weights, (what, extra)
