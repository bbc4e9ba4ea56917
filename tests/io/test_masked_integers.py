"""Integers under a mask inside of groups: every bit comes back, in the bytes that they take."""

from __future__ import annotations

import base64
import json
import math
import os
import struct
import zlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError
from sparseworks.core.masks import Masks
from sparseworks.core.patterns import NM
from sparseworks.io.packed import DIGEST_KEY, hasher, header_digest
from sparseworks.io.reading import read_record
from sparseworks.kernels.grids import Grid
from sparseworks.models.quantized import Grids, Quantized, attach_grids
from sparseworks.models.views import View, find_prunable


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(24, 3))
    if kind == "transposed":
        from transformers.pytorch_utils import Conv1D

        return nn.Sequential(Conv1D(24, 32), nn.Linear(24, 3))
    if kind == "wide":
        return nn.Sequential(nn.Linear(96, 40, bias=False)).double()
    return nn.Sequential(nn.Linear(48, 20, bias=False), nn.Linear(20, 3))


def mask_of(view: View, pattern: str, sparsity: float, draw: torch.Generator) -> Tensor:
    """A mask as a matrix."""
    scores = torch.rand(view.shape, generator=draw)
    if pattern == "2:4":
        return NM(2, 4).select(scores)
    if pattern == "rows":  # kept whole or not at all
        return (scores[:, :1] >= sparsity).expand(view.shape).contiguous()
    return scores >= sparsity


def entry_of(view: View, mask: Tensor, bits: int, group: int, zeros: bool,
             draw: torch.Generator) -> Quantized:  # fmt: skip
    """Random integers under a mask; a third of the kept ones are the zero of their group."""
    rows, columns = view.shape
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    shape = (rows, columns // group)
    zero = torch.randint(low, high, shape, generator=draw).to(torch.int8) if zeros else None
    base = torch.zeros(shape, dtype=torch.int8) if zero is None else zero
    codes = torch.randint(low, high, (*shape, group), generator=draw).to(torch.int8)
    kept = mask.view(*shape, group)
    used = kept & (torch.rand(kept.shape, generator=draw) > 1 / 3)
    codes = torch.where(used, codes, base[..., None])
    scale = torch.rand(shape, generator=draw).half() + 0.5
    return Quantized.of(view, Grid(codes, scale, zero), bits, kept.any(2))


def made(kind: str, pattern: str, sparsity: float, bits: int, group: int, zeros: bool,
         dtype: str, seed: int, record: bool = True) -> tuple[nn.Module, str, Tensor]:  # fmt: skip
    """A model, the name of its integers, and their mask as a matrix."""
    model = model_of(kind).to(getattr(torch, dtype))
    view = find_prunable(model)[0]
    draw = torch.Generator().manual_seed(seed)
    mask = mask_of(view, pattern, sparsity, draw)
    entry = entry_of(view, mask, bits, group, zeros, draw)
    with torch.no_grad():
        view.parameter.copy_(entry.weight())
    attach_grids(model, Grids({view.name: entry}))
    if record:
        kept = view.from_matrix(mask).contiguous()
        sw.attach(model, Masks().with_mask(view.name, kept, pattern if ":" in pattern else "x"))
    return model, view.name, mask


def same(a: nn.Module, b: nn.Module, name: str) -> None:
    """Bit for bit, integers and masks too."""
    for (key, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)), key
    one, other = sw.grids(a)[name], sw.grids(b)[name]
    assert torch.equal(one.grid.codes, other.grid.codes)
    assert torch.equal(one.grid.scale, other.grid.scale)
    assert (one.grid.zero is None) == (other.grid.zero is None)
    assert one.grid.zero is None or torch.equal(one.grid.zero, other.grid.zero)
    assert (one.live is None) == (other.live is None)
    assert one.live is None or torch.equal(one.live, other.live)
    assert (one.bits, one.layout, one.shape) == (other.bits, other.layout, other.shape)
    masks = sw.masks(a), sw.masks(b)
    assert (masks[0] is None) == (masks[1] is None)
    if masks[0] is not None:
        assert torch.equal(masks[0][name], masks[1][name])
        assert masks[0].entry(name).pattern == masks[1].entry(name).pattern


def bytes_needed(mask: Tensor, bits: int, group: int, zeros: bool, pattern: str) -> int:
    """A bit a weight (3 for 4 at 2:4), the kept integers, and scales and zeros of live groups."""
    n, kept = mask.numel(), int(mask.sum())
    live = int(mask.view(mask.shape[0], -1, group).any(2).sum())
    places = 0 if kept == n else math.ceil(n / 4 * 3 / 8) if pattern == "2:4" else math.ceil(n / 8)
    return places + math.ceil(kept * bits / 8) + 2 * live + zeros * math.ceil(live * bits / 8)


CASES = {
    "kind": st.sampled_from(["linear", "conv", "transposed"]),
    "bits": st.integers(2, 8), "group": st.sampled_from([4, 8]), "zeros": st.booleans(),
    "dtype": st.sampled_from(["float32", "bfloat16"]), "seed": st.integers(0, 99),
}  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(pattern=st.sampled_from(["unstructured", "2:4", "rows"]),
       sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]), **CASES)  # fmt: skip
def test_masked_integers_come_back_in_no_more_than_they_take(tmp_path_factory, pattern, sparsity,
                                                             **case):  # fmt: skip
    model, name, mask = made(pattern=pattern, sparsity=sparsity, **case)
    path = tmp_path_factory.mktemp("m") / "m.safetensors"
    info = {t.name: t for t in sw.save(model, path).tensors}[name]
    again = model_of(case["kind"]).to(getattr(torch, case["dtype"]))
    sw.load(path, again)
    if info.layout.startswith("int"):
        same(model, again, name)
    else:  # next to nothing is kept, or nothing
        assert torch.equal(model.get_parameter(name), again.get_parameter(name))
    assert info.mask_sparsity == pytest.approx(1 - float(mask.float().mean()))
    wanted = bytes_needed(mask, case["bits"], case["group"], case["zeros"], pattern)
    assert info.nbytes <= wanted + 256  # what two more parts cost in the header


@settings(max_examples=40, deadline=None)
@given(sparsity=st.sampled_from([0.0, 0.6, 0.95]), **CASES)
def test_zeros_without_a_mask_are_left_out_where_that_is_less(tmp_path_factory, sparsity, **case):
    model, name, mask = made(pattern="unstructured", sparsity=sparsity, record=False, **case)
    path = tmp_path_factory.mktemp("m") / "m.safetensors"
    info = {t.name: t for t in sw.save(model, path).tensors}[name]
    again = model_of(case["kind"]).to(getattr(torch, case["dtype"]))
    sw.load(path, again)
    if info.layout.startswith("int"):
        same(model, again, name)
    assert torch.equal(model.get_parameter(name), again.get_parameter(name))
    assert sw.masks(again) is None
    wanted = bytes_needed(mask, case["bits"], case["group"], case["zeros"], "")
    assert info.nbytes <= min(wanted, sw.grids(model)[name].nbytes) + 512  # of four more parts


@pytest.mark.parametrize(("pattern", "sparsity", "layout"), [
    ("unstructured", 0.5, "int4/16 bitmask"), ("2:4", 0.5, "int4/16 2:4"),
    ("rows", 0.5, "int4/16"), ("unstructured", 0.0, "int4/16"),
])  # fmt: skip
def test_the_smallest_layout_is_named(tmp_path, pattern, sparsity, layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 3))
    sw.prune(model, "magnitude", include="0.weight", **(
        {"pattern": pattern} if pattern == "2:4" else {"sparsity": sparsity}
    ))  # fmt: skip
    if pattern == "rows":
        kept = torch.arange(128)[:, None].expand(128, 256) % 2 == 0
        record = Masks().with_mask("0.weight", kept)
        record.apply(model)
        sw.attach(model, record)
    done = sw.quantize(model, "rounding", bits=4, group=16)
    info = sw.save(model, tmp_path / "m.safetensors")
    found = {t.name: t for t in info.tensors}["0.weight"]
    assert found.layout == layout
    assert info.version == (2 if " " in layout else 1)
    assert sw.io.inspect(tmp_path / "m.safetensors") == info
    mask = done.grids["0.weight"].mask()
    mask = mask & sw.masks(model)["0.weight"] if sw.masks(model) is not None else mask
    wanted = bytes_needed(mask, 4, 16, True, pattern)
    assert found.nbytes <= wanted * (1.0 if " " in layout else 1.02)


def test_a_mask_that_weights_contradict_keeps_bits_of_its_own(tmp_path):
    """A weight that regrew, and one that the mask keeps in a group that is gone."""
    for change in ("regrown", "dropped"):
        model, name, mask = made("linear", "unstructured", 0.5, 4, 8, True, "float32", 3)
        entry = sw.grids(model)[name]
        other = mask.clone()
        if change == "regrown":
            row, column = (entry.weight() != 0).nonzero()[0].tolist()
            other[row, column] = False
        else:
            live = torch.ones(entry.grid.scale.shape, dtype=torch.bool)
            live[2, 3] = False
            view = find_prunable(model)[0]
            entry = Quantized.of(view, entry.grid, 4, live)
            with torch.no_grad():
                view.parameter.copy_(entry.weight())
            attach_grids(model, Grids({name: entry}))
            other[2, 24:32] = True
        sw.attach(model, Masks().with_mask(name, other))
        sw.save(model, tmp_path / "m.safetensors")
        again = sw.load(tmp_path / "m.safetensors", model_of("linear"))
        same(model, again, name)


# `Linear(32, 16)`, half pruned, 4 bits in groups of 8, as version 1 of the format stored it
OLD = """
eNp1km9oG2Ucx48NlgxmL+CLDsEtOZ8HJ4buksvf6uycMKyozD8TRhOap8lzydn07nr3ZLfZxnTttCe4xc2BzSZUhDnYi4m+kIEw
3wgF/9DicCuiWy3o3Iu5tJEmY52Pz91gtG4NHPy+3+f3+zzfPM+zZz3n/oaE3t4BTFAOEdTbK3QOCbJmDCAidAo6EYKCqSPDxJZm
9JvMGkoJ+7FhKpqaEjpDwZTARgtajglWoryqkFIOpwRnQcvhouu/hgdLWCUKKroLRMEm84fKTo1VUzNcmRLEDgsr+QK5q3LkoI7d
ebmoISKF3WGzgFy3JxQLSuE0c4rooFYibmPeUHJ3u4hmYCdUVIwwqWrqW9jQmA5HY040ZPa7A5qluv39WCf3VnVECDZUt6GkmsQo
ZUnJxTkoNOCm71kZ14nRpxDHd7bLG1pJZ3WC1c6+js8omEnNyGHDJRcVFSPDZRaQWXC9sBhBEZSNSfG+UDIbS4pSNppMRHOiGOlL
RHEsJZTL5dVX0ptT8th0LiuRDYkSkpMJhKRsPIRQJCtFIlEkJeJ9YhiHhHLwXuTOTjOLith0bts9Zza/OxRz0M75sr8Xk9JBwX0S
miybmLDWHjEYCsfSqzCKSnCevYeVoL2JFZxwNHw/iGGCUjyxGuWe1Joc6QEYhghGQuJqTFHZj9ekJO6HMACD/C+L80DWhMQiD6Kw
KIlwulz2z4FvA0eADfvheTAFzvmTsBt+ASEMwbPgefhd4FPwdeB38D14M2DAX8A82OW/CDT4CLwEOmA3eBku+StwAehb94JF/5OP
tcNT0CucBHH/NFwHMwGvcIb1fQnOgMOBl6AOz8MbgVeYnganwVHYAWZ9dovSPfSy3rxm82OtsXUNu7bxOJWX5U38Iv1n2FrWr/3r
eXyhzba7a5Oi5b9qfSDUbi0+ZFmUZqjXHq1yn3zOH5t8wne9bXuN+ig9VK3O2Lxdte2Zm3WxsXjZN98U25rWyKjdaj7qsVq2d4uc
0TIj2y7e4TieG3m4y26fa1q0Tnnetse2Ulq3mrpl6XeGLW568PaP3Pv1rzJ/Uuavn1/e8mHj+M6/f+Xr9QmOE+beXig3PTenjIou
L22Q+S7aqI5u9nJ/1W3Phco8bdS7ptr15uTGYycOzbSuWJan8iydm+Vl+VJrfGLJmvio6a1V7cr4+LsjzZblWZrgrHz1QOW98Q1s
v9vso0fFzz7eMfvD7sFz/E9PH+HFVw/88cymn1+spy9w29/pmH/9lm9Hx+Hndm0mw9OndtLfJtuuXn9j2wunn7py4uS+G5lvxv4D
40H70Q==
"""


def test_a_file_of_version_1_is_read(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(zlib.decompress(base64.b64decode(OLD)))
    model = sw.load(path, nn.Sequential(nn.Linear(32, 16, bias=False)))
    assert sw.io.inspect(path).version == 1
    grid = sw.grids(model)["0.weight"]
    assert (grid.bits, grid.group) == (4, 8) and grid.holds(model[0].weight)
    assert sw.masks(model).sparsity("0.weight") == 0.5
    assert not bool(model[0].weight[~sw.masks(model)["0.weight"]].any())
    sw.save(model, tmp_path / "new.safetensors")
    assert sw.io.inspect(tmp_path / "new.safetensors").version == 2
    again = sw.load(tmp_path / "new.safetensors", nn.Sequential(nn.Linear(32, 16, bias=False)))
    same(model, again, "0.weight")


def parts(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def resealed(header: dict, data: bytes, own: dict) -> bytes:
    """A file whose header's digest is right."""

    def joined() -> bytes:
        text = json.dumps(header, separators=(",", ":")).encode()
        return struct.pack("<Q", len(text)) + text

    header["__metadata__"]["sparseworks"] = json.dumps(own, separators=(",", ":"))
    header["__metadata__"][DIGEST_KEY] = "0" * 32
    header["__metadata__"][DIGEST_KEY] = header_digest(joined()[8:], "0" * 32)
    return joined() + data


def lie(good: bytes, part: str, edit: Callable[[bytearray], None]) -> bytes:
    """A file with a part edited and every hash made right again."""
    header, data = parts(good)
    own, bad = json.loads(header["__metadata__"]["sparseworks"]), bytearray(data)
    start, end = header[part]["data_offsets"]
    piece = bad[start:end]
    edit(piece)
    bad[start:end] = piece
    name = part.split("::")[0]
    record = read_record("test", own["tensors"][name])
    h = hasher()
    h.update(record.seal())
    for key in record.parts():
        first, last = header[f"{name}::{key}"]["data_offsets"]
        h.update(bad[first:last])
    own["tensors"][name]["hash"] = h.hexdigest()
    return resealed(header, bytes(bad), own)


def flip(position: int) -> Callable[[bytearray], None]:
    def edit(piece: bytearray) -> None:
        piece[position // 8] ^= 1 << position % 8

    return edit


@pytest.fixture(scope="module")
def goods(tmp_path_factory) -> dict[str, bytes]:
    """A file for each way to say where the integers are."""
    found = {}
    for places, pattern, sparsity in (("all", "unstructured", 0.5), ("live", "unstructured", 0.9),
                                      ("nm", "2:4", 0.5)):  # fmt: skip
        model, _, _ = made("wide", pattern, sparsity, 7, 4, True, "float64", 4)
        path = tmp_path_factory.mktemp("good") / "m.safetensors"
        sw.save(model, path)
        found[places] = path.read_bytes()
        own = json.loads(parts(found[places])[0]["__metadata__"]["sparseworks"])
        assert own["tensors"]["0.weight"]["places"] == places
    return found


def refused(data: bytes, tmp_path, match: str) -> None:
    path, model = tmp_path / "bad.safetensors", model_of("wide")
    path.write_bytes(data)
    before = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(CheckpointError, match=match):
        sw.load(path, model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert sw.masks(model) is None and sw.grids(model) is None


@pytest.mark.parametrize(("places", "step"), [("all", 7), ("live", 1), ("nm", 7)])
def test_every_byte_has_a_guard(goods, tmp_path, places, step):
    path, model, good = tmp_path / "bad.safetensors", model_of("wide"), goods[places]
    before = model[0].weight.clone()
    path.write_bytes(good)
    with open(path, "r+b", buffering=0) as file:
        for position in range(0, len(good), step):
            os.pwrite(file.fileno(), bytes([good[position] ^ 1 << position % 8]), position)
            with pytest.raises(CheckpointError):
                sw.load(path, model)
            os.pwrite(file.fileno(), good[position : position + 1], position)
    assert path.read_bytes() == good
    assert torch.equal(model[0].weight, before) and sw.grids(model) is None


@pytest.mark.parametrize(("places", "change"), [
    ("all", {"places": "live"}), ("live", {"places": "all"}), ("all", {"places": "nm"}),
    ("nm", {"places": "all"}), ("all", {"places": ""}), ("nm", {"places": "tree"}),
    ("all", {"groups": 0}), ("live", {"groups": 241}), ("all", {"groups": 10**30}),
    ("nm", {"n": 0}), ("nm", {"m": 0}), ("nm", {"n": 1}), ("nm", {"m": 17}), ("all", {"stored": 1}),
    ("live", {"kept": 0}), ("all", {"layout": "bitmask"}), ("all", {"mask": "own"}),
])  # fmt: skip
def test_a_record_that_lies_names_its_tensor(goods, tmp_path, places, change):
    header, data = parts(goods[places])
    own = json.loads(header["__metadata__"]["sparseworks"])
    own["tensors"]["0.weight"].update(change)
    refused(resealed(header, data, own), tmp_path, "'0.weight'")


@pytest.mark.parametrize(("places", "part", "position"), [
    ("all", "bitmask", 0), ("live", "bitmask", 3), ("live", "live", 0),
])  # fmt: skip
def test_bits_that_contradict_the_record_are_refused(goods, tmp_path, places, part, position):
    """Hashes that are right do not make counts right."""
    refused(lie(goods[places], f"0.weight::{part}", flip(position)), tmp_path, "its bits")


def test_codes_out_of_range_and_padding_are_refused(goods, tmp_path):
    def seven(piece: bytearray) -> None:
        piece[0] |= 7  # 2:4 has codes 0 to 5

    path = tmp_path / "sound.safetensors"
    path.write_bytes(lie(goods["nm"], "0.weight::codes", lambda piece: None))
    sw.load(path, model_of("wide"))  # the helper itself makes sound files
    refused(lie(goods["nm"], "0.weight::codes", seven), tmp_path, "its bits")
    header, _ = parts(goods["live"])
    own = json.loads(header["__metadata__"]["sparseworks"])["tensors"]["0.weight"]
    bits = own["groups"] * own["group"]
    assert bits % 8  # seed 4 leaves half a byte
    refused(lie(goods["live"], "0.weight::bitmask", flip(bits)), tmp_path, "its bits")
