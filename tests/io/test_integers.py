"""Quantized weights in files: every bit comes back, in the bytes that they should take."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseworks as sw
import tiny_models
from sparseworks.core.errors import CheckpointError, ModelError
from sparseworks.io.integers import pack_integers, unpack_integers
from sparseworks.kernels.grids import Grid
from sparseworks.models.quantized import Grids, Quantized, attach_grids
from sparseworks.models.views import find_prunable


@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 999))
def test_integers_are_packed_and_back(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = torch.randint(low, high, (count,), generator=generator).to(torch.int8)
    packed = pack_integers(values, bits)
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack_integers(packed, count, bits), values)
    text = "".join(format(int(v) - low, f"0{bits}b")[::-1] for v in values)
    told = "".join(format(int(b), "08b")[::-1] for b in packed)
    assert told[: len(text)] == text and "1" not in told[len(text) :]


def model_of(kind):
    torch.manual_seed(0)
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 3))
    if kind == "transposed":
        from transformers.pytorch_utils import Conv1D

        return nn.Sequential(Conv1D(10, 24), nn.Linear(10, 3))
    return nn.Sequential(nn.Linear(24, 10), nn.Linear(10, 3))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["linear", "conv", "transposed"]), st.integers(2, 8),
    st.sampled_from([2, 8, 24]), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(0, 99),
)  # fmt: skip
def test_a_model_comes_back_bit_for_bit(tmp_path_factory, kind, bits, group, zeros, pruned, dtype,
                                        seed):  # fmt: skip
    model = model_of(kind).to(getattr(torch, dtype))
    view = find_prunable(model)[0]
    generator = torch.Generator().manual_seed(seed)
    rows, columns = view.shape
    live = torch.rand(rows, columns // group, generator=generator) >= pruned
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    shape = (rows, columns // group)
    codes = torch.randint(low, high, (*shape, group), generator=generator).to(torch.int8)
    zero = torch.randint(low, high, shape, generator=generator).to(torch.int8)
    scale = torch.randn(shape, generator=generator).half()
    entry = Quantized.of(view, Grid(codes, scale, zero if zeros else None), bits, live)
    with torch.no_grad():
        view.parameter.copy_(entry.weight())
    attach_grids(model, Grids({view.name: entry}))
    path = tmp_path_factory.mktemp("g") / "m.safetensors"
    info = {t.name: t for t in sw.save(model, path).tensors}
    again = model_of(kind).to(getattr(torch, dtype))
    sw.load(path, again)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    if info[view.name].layout.startswith("int"):
        assert info[view.name].nbytes == entry.nbytes
        back = sw.grids(again)[view.name]
        assert torch.equal(back.grid.codes, entry.grid.codes) and back.bits == bits
        assert torch.equal(back.grid.scale, entry.grid.scale)
        assert (back.grid.zero is None) == (not zeros)
        assert not zeros or torch.equal(back.grid.zero, entry.grid.zero)
        assert back.layout == entry.layout and back.holds(again.get_parameter(view.name))
    else:
        assert bits * group + 16 >= 8 * view.parameter.element_size() or pruned


def test_it_is_the_smallest_layout_with_its_mask_and_in_folders(tmp_path):
    model = tiny_models.language_model()
    done = sw.quantize(model, "gqsa", data=tiny_models.texts(), block_epochs=0, tune_epochs=0)
    info = {t.name: t for t in sw.save(model, tmp_path / "folder").tensors}
    assert all(info[n].layout == "int4/16" for n in done.grids)
    assert sum(info[n].nbytes for n in done.grids) == done.grids.nbytes
    assert all(info[n].mask_sparsity == 0.5 for n in done.grids)
    again = sw.from_pretrained(tmp_path / "folder")
    assert set(sw.grids(again)) == set(done.grids)
    assert all(torch.equal(m, sw.masks(model)[n]) for n, m in sw.masks(again).items())
    twin = copy.deepcopy(again)
    assert all(q.holds(twin.get_parameter(n)) for n, q in sw.grids(twin).items())


def test_a_mask_inside_of_groups_has_bits_of_its_own(tmp_path):
    model = tiny_models.language_model()
    sw.prune(model, "magnitude", pattern="2:4")
    done = sw.quantize(model, "rounding", bits=4, group=16)
    sw.save(model, tmp_path / "m.safetensors")
    again = tiny_models.language_model()
    sw.load(tmp_path / "m.safetensors", again)
    for name in done.grids:
        assert torch.equal(sw.masks(again)[name], sw.masks(model)[name])
        assert not again.get_parameter(name).detach()[~sw.masks(again)[name]].any()


def test_weights_that_changed_are_stored_as_they_are(tmp_path):
    model = tiny_models.language_model()
    done = sw.quantize(model, "rounding")
    name = next(iter(done.grids))
    with torch.no_grad():
        model.get_parameter(name)[0, 0] += 1e-6
    info = {t.name: t for t in sw.save(model, tmp_path / "m.safetensors").tensors}
    assert (
        not info[name].layout.startswith("int")
        and len(sw.grids(model).held_by(model)) == len(done.grids) - 1
    )
    again = tiny_models.language_model()
    sw.load(tmp_path / "m.safetensors", again)
    assert torch.equal(again.get_parameter(name), model.get_parameter(name))
    assert name not in sw.grids(again) and len(sw.grids(again)) == len(done.grids) - 1


def test_loading_another_checkpoint_takes_the_record_off(tmp_path):
    plain = tiny_models.language_model()
    sw.save(plain, tmp_path / "plain.safetensors")
    model = tiny_models.language_model()
    sw.quantize(model, "rounding")
    sw.load(tmp_path / "plain.safetensors", model)
    assert sw.grids(model) is None


def test_a_record_of_another_model_is_refused():
    model = tiny_models.language_model()
    done = sw.quantize(model, "rounding")
    with pytest.raises(ModelError, match="does not have"):
        attach_grids(nn.Linear(2, 2), done.grids)


@pytest.mark.parametrize("change", [
    {"bits": 9}, {"group": 7}, {"stored": 3}, {"order": "odd"}, {"bits": 3}, {"zeros": False},
    {"order": "transposed"},
])  # fmt: skip
def test_headers_that_lie_are_refused(tmp_path, change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 3))
    sw.quantize(model, "rounding", group=16)
    path = tmp_path / "m.safetensors"
    sw.save(model, path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    own = json.loads(header["__metadata__"]["sparseworks"])
    own["tensors"]["0.weight"].update(change)
    header["__metadata__"]["sparseworks"] = json.dumps(own, separators=(",", ":"))
    new = json.dumps(header, separators=(",", ":")).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError):
        sw.load(path, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_flipped_bit_is_found(tmp_path):
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 3))
    sw.quantize(model, "rounding", group=16)
    path = tmp_path / "m.safetensors"
    sw.save(model, path)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        sw.load(path, model)
