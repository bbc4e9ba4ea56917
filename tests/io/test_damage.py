"""A file that is not what `save` wrote is refused, and the model is as it was."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError, InvalidArgument, ModelError
from sparseworks.core.masks import MaskEntry, Masks
from sparseworks.io.packed import DIGEST_KEY, hasher, header_digest
from sparseworks.io.reading import read_record


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 24), nn.BatchNorm1d(24), nn.Linear(24, 16)).eval()


def sparse_model() -> nn.Module:
    model = make(1)
    two_four = torch.tensor([True, False, False, True]).repeat(16 * 6).view(16, 24)
    record = Masks(method="wanda").with_mask("0.weight", torch.rand(24, 32) < 0.2)
    record = record.with_mask("2.weight", two_four, "2:4")
    record.apply(model)
    model[0].weight.data[~record["0.weight"] & (torch.rand(24, 32) < 0.5)] = -0.0
    sw.attach(model, record)
    return model


def state(model: nn.Module) -> list[bytes]:
    return [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in model.state_dict().values()]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.safetensors"
    sw.save(sparse_model(), path)
    return path.read_bytes()


def refused(data: bytes, folder: Path, match: str | None = None) -> str:
    """Loading this must fail with a message and leave the model alone; returns the message."""
    path = folder / "bad.safetensors"
    path.write_bytes(data)
    model = make()
    before = state(model)
    with pytest.raises(CheckpointError, match=match) as error:
        sw.load(path, model)
    assert state(model) == before and sw.masks(model) is None
    assert path.read_bytes() == data
    return str(error.value)


def test_every_corrupted_byte_is_found(good, tmp_path):
    """No byte of a file is without a guard: change any one and loading refuses."""
    path, model = tmp_path / "bad.safetensors", make()
    before = state(model)
    path.write_bytes(good)
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(good):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << position % 8]), position)
            with pytest.raises(CheckpointError):
                sw.load(path, model)
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert path.read_bytes() == good
    assert state(model) == before and sw.masks(model) is None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_several_changes_are_found(good, tmp_path_factory, data):
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(good) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=9))
        bad[start : start + len(piece)] = piece
    if bytes(bad) != good:
        refused(bytes(bad), tmp_path_factory.mktemp("fuzz"))


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 1 << 30))
def test_every_truncation_is_found(good, tmp_path_factory, cut):
    refused(good[: cut % len(good)], tmp_path_factory.mktemp("cut"))


def test_bytes_appended_are_found(good, tmp_path):
    refused(good + b"\0", tmp_path, "belong to no tensor")


def parts(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict, data: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_changed_weight_names_its_tensor(good, tmp_path):
    header, data = parts(good)
    for part, entry in header.items():
        if part == "__metadata__" or entry["data_offsets"][0] == entry["data_offsets"][1]:
            continue
        bad = bytearray(data)
        bad[entry["data_offsets"][0]] ^= 0x10
        message = refused(join(header, bytes(bad)), tmp_path)
        assert repr(part.split("::")[0]) in message


def change(
    good: bytes, edit: Callable[[dict], None], own: bool = False, seal: bool = True
) -> bytes:
    """The file with its header edited; the digest made right again, as an attacker would."""
    header, data = parts(good)
    if own:
        inner = json.loads(header["__metadata__"]["sparseworks"])
        edit(inner)
        header["__metadata__"]["sparseworks"] = json.dumps(inner, separators=(",", ":"))
    else:
        edit(header)
    if seal:
        header["__metadata__"][DIGEST_KEY] = "0" * 32
        digest = header_digest(join(header, b"")[8:], "0" * 32)
        header["__metadata__"][DIGEST_KEY] = digest
    return join(header, data)


def test_sealing_again_is_what_the_reader_checks(good, tmp_path):
    """The helper of the tests below makes files that load when nothing is wrong with them."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(change(good, lambda h: None))
    sw.load(path, make())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [16, 48]),
        ("dtype", "float64"),
        ("pattern", "1:4"),
        ("layout", "dense"),
        ("layout", "tree"),
        ("stored", 100),
        ("stored", -1),
        ("stored", True),
        ("stored", 10**30),
        ("kept", 3),
        ("n", 3),
        ("m", 0),
        ("m", 17),
        ("axis", 0),
        ("axis", 5),
        ("mask", "none"),
        ("mask", "own"),
        ("names", []),
        ("names", ["0.weight"]),
        ("hash", "00"),
        ("colour", "red"),
    ],
)
def test_a_changed_record_names_its_tensor(good, tmp_path, field, value):
    def edit(inner: dict) -> None:
        inner["tensors"]["2.weight"][field] = value

    assert "'2.weight'" in refused(change(good, edit, own=True), tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h.update(version=0),
        lambda h: h.update(version=3),
        lambda h: h.update(version="1"),
        lambda h: h.pop("tensors"),
        lambda h: h.update(ties={"0.weight": "2.weight"}),
        lambda h: h.update(ties={"x": "y"}),
        lambda h: h.update(ties={"x": "0.weight"}),
        lambda h: h.update(ties={"x": 3}),
        lambda h: h["tensors"].pop("2.weight"),
        lambda h: h["tensors"].update({"extra": h["tensors"]["0.bias"]}),
        lambda h: h["tensors"].update({"0.bias": 3}),
    ],
)
def test_a_changed_list_of_tensors_is_found(good, tmp_path, edit):
    refused(change(good, edit, own=True), tmp_path)


def test_a_changed_method_is_found(good, tmp_path):
    bad = change(good, lambda h: h.update(method="x"), own=True, seal=False)
    refused(bad, tmp_path, "header was altered")


def offsets(name: str, start: int, end: int) -> Callable[[dict], None]:
    return lambda h: h[name].update(data_offsets=[start, end])


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (offsets("0.bias", 0, 96), "0.bias"),
        (offsets("0.bias", 1 << 62, (1 << 62) + 96), "past the end"),
        (offsets("0.bias", -96, 0), "0.bias"),
        (offsets("0.bias", 96, 0), "0.bias"),
        (offsets("0.bias", 0.0, 96), "0.bias"),
        (lambda h: h["0.bias"].update(shape=[1 << 63, 1 << 63]), "0.bias"),
        (lambda h: h["0.bias"].update(shape=[-24]), "0.bias"),
        (lambda h: h["0.bias"].update(shape=[True] * 24), "0.bias"),
        (lambda h: h["0.bias"].update(shape=[1] * 5000), "0.bias"),
        (lambda h: h["0.bias"].update(dtype="F33"), "F33"),
        (lambda h: h["0.bias"].update(dtype=["F32"]), "not supported"),
        (lambda h: h["0.bias"].update(note=1), "malformed"),
        (lambda h: h.update({"0.bias": 7}), "malformed"),
        (lambda h: h["__metadata__"].update(sparseworks="{"), "damaged"),
        (lambda h: h["__metadata__"].update(sparseworks="[" * 100_000), "damaged"),
        (lambda h: h["__metadata__"].update(sparseworks="[]"), "damaged"),
        (lambda h: h["__metadata__"].update(other=3), "map of strings"),
        (lambda h: h.pop("0.weight::bitmask"), "gap"),
    ],
)
def test_an_absurd_header_is_refused(good, tmp_path, edit, word):
    assert word in refused(change(good, edit), tmp_path)


def test_a_name_given_twice_is_refused(good, tmp_path):
    header, data = parts(good)
    text = json.dumps(header)[:-1] + ', "0.bias": ' + json.dumps(header["0.bias"]) + "}"
    bad = struct.pack("<Q", len(text)) + text.encode() + data
    refused(bad, tmp_path, "twice")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 100,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 6) + b'{"\xff":}',
        struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995,
        struct.pack("<Q", 10_006) + b'{"a":' + b"9" * 10_000 + b"}",
    ],
)
def test_files_of_no_sense_are_refused(tmp_path, data):
    refused(data, tmp_path)


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.pkl", "m.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_whatever_its_name(tmp_path, name, zipped):
    torch.save(make(1).state_dict(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    model = make()
    before = state(model)
    with pytest.raises(CheckpointError, match="pickle"):
        sw.load(tmp_path / name, model)
    assert state(model) == before


def test_a_folder_of_pickles_is_refused(tmp_path):
    torch.save(make(1).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        sw.load(tmp_path, make())


def test_saving_under_the_name_of_a_pickle_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="pickle"):
        sw.save(make(), tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(
    ("other", "word"),
    [
        (lambda: nn.Sequential(nn.Linear(32, 24), nn.BatchNorm1d(24)), "'2.weight'"),
        (lambda: nn.Sequential(*make(), nn.Linear(16, 2)), "'3.weight'"),
        (lambda: nn.Sequential(nn.Linear(32, 25), *list(make())[1:]), "'0.weight' has shape"),
        (lambda: make().double(), "'0.weight' is torch.float32"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, other, word, pack):
    path = tmp_path / "m.safetensors"
    (sw.save if pack else sw.export_dense)(make(1), path)
    model = other()
    before = state(model)
    with pytest.raises(CheckpointError, match=word):
        sw.load(path, model)
    assert state(model) == before


def test_values_that_differ_for_one_tensor_are_refused(tmp_path):
    """A model ties what the file holds twice."""
    save_file(
        {"a.weight": torch.ones(3, 3), "b.weight": torch.zeros(3, 3)}, tmp_path / "m.safetensors"
    )
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    before = state(model)
    with pytest.raises(CheckpointError, match=r"'a.weight' and 'b.weight' differ"):
        sw.load(tmp_path / "m.safetensors", model)
    assert state(model) == before
    save_file(
        {"a.weight": torch.ones(3, 3), "b.weight": torch.ones(3, 3)}, tmp_path / "m.safetensors"
    )
    sw.load(tmp_path / "m.safetensors", model)
    assert bool((model["a"].weight == 1).all())


def test_missing_places_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        sw.load(tmp_path / "none.safetensors", make())
    with pytest.raises(CheckpointError, match="no weights"):
        sw.load(tmp_path, make())
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is not a folder"):
        sw.save(make(), tmp_path / "file" / "no" / "m.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        sw.save(make(), tmp_path / "d.safetensors")
    with pytest.raises(InvalidArgument, match="'file' or 'huggingface'"):
        sw.save(make(), tmp_path / "m.safetensors", format="zip")


class Odd(nn.Module):
    def __init__(self, tensor: object) -> None:
        super().__init__()
        self.odd = nn.Parameter(tensor, requires_grad=False) if tensor is not None else None  # type: ignore[arg-type]


def test_what_cannot_be_stored_is_named(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(ModelError, match="odd: on the meta device"):
        sw.save(Odd(torch.empty(3, device="meta")), path)
    with pytest.raises(ModelError, match="odd: the tensor is of layout"):
        sw.save(Odd(torch.eye(3).to_sparse()), path)
    with pytest.raises(ModelError, match=r"0\.weight: not initialised"):
        sw.save(nn.Sequential(nn.LazyLinear(3)), path)

    class Extra(nn.Module):
        def get_extra_state(self) -> object:
            return {"a": 1}

    with pytest.raises(ModelError, match="_extra_state"):
        sw.save(Extra(), path)
    assert not list(tmp_path.iterdir())


def test_a_dtensor_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(distribute_tensor(model.weight.data, mesh, [Replicate()]))
        with pytest.raises(ModelError, match="weight: a DTensor"):
            sw.save(model, tmp_path / "m.safetensors")
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "m.safetensors").exists()


def lie(good: bytes, part: str, edit: Callable[[bytearray], None]) -> bytes:
    """The file with a part edited and every hash made right again."""
    header, data = parts(good)
    bad = bytearray(data)
    start, end = header[part]["data_offsets"]
    piece = bad[start:end]
    edit(piece)
    bad[start:end] = piece
    name = part.split("::")[0]

    def rehash(inner: dict) -> None:
        entry = inner["tensors"][name]
        made = read_record("test", entry)
        h = hasher()
        h.update(made.seal())
        for key in made.parts():
            first, last = header[f"{name}::{key}" if key else name]["data_offsets"]
            h.update(bad[first:last])
        entry["hash"] = h.hexdigest()

    return change(join(header, bytes(bad)), rehash, own=True)


def set_bit(position: int) -> Callable[[bytearray], None]:
    def edit(piece: bytearray) -> None:
        piece[position // 8] |= 1 << position % 8

    return edit


def test_a_file_made_to_lie_is_refused(tmp_path):
    """Hashes that are right do not make counts, padding and codes right."""
    model = nn.Linear(75, 5, bias=False)
    record = Masks.of({"weight": torch.arange(375).view(5, 75) % 3 == 0})
    record.apply(model)
    model.weight.data[0, 1] = -0.0
    sw.attach(model, record)
    path = tmp_path / "m.safetensors"
    sw.save(model, path)
    good = path.read_bytes()

    def attempt(data: bytes, into: nn.Module) -> None:
        path.write_bytes(data)
        before = state(into)
        with pytest.raises(CheckpointError, match=r"weight': (its bits|a code)"):
            sw.load(path, into)
        assert state(into) == before

    path.write_bytes(lie(good, "weight::values", lambda p: None))
    sw.load(path, nn.Linear(75, 5, bias=False))  # the helper itself makes sound files
    for data in (
        lie(good, "weight::bitmask", set_bit(1)),
        lie(good, "weight::bitmask", set_bit(375)),
        lie(good, "weight::signs", set_bit(255)),
    ):
        attempt(data, nn.Linear(75, 5, bias=False))
    model = nn.Linear(75, 5, bias=False)
    sw.attach(model, record)
    sw.save(model, path)
    good = path.read_bytes()
    attempt(lie(good, "weight::mask", set_bit(1)), nn.Linear(75, 5, bias=False))
    attempt(lie(good, "weight::mask", set_bit(375)), nn.Linear(75, 5, bias=False))
    model = nn.Linear(256, 8, bias=False)
    record = Masks.of({"weight": torch.arange(2048).view(8, 256) % 4 < 2}, "m", "2:4")
    record.apply(model)
    sw.attach(model, record)
    sw.save(model, path)
    attempt(
        lie(path.read_bytes(), "weight::codes", set_bits(0, 1, 2)), nn.Linear(256, 8, bias=False)
    )


def set_bits(*positions: int) -> Callable[[bytearray], None]:
    def edit(piece: bytearray) -> None:
        for position in positions:
            set_bit(position)(piece)

    return edit


def test_dirty_padding_in_a_record_does_no_harm(tmp_path):
    """A record restored from elsewhere may have bits past its end; the file must not."""
    packed = torch.tensor([0b10101, 0b11111010], dtype=torch.uint8)
    model = nn.Linear(3, 4, bias=False)
    record = Masks({"weight": MaskEntry(packed, (4, 3), 5)})
    sw.attach(model, record)
    sw.save(model, tmp_path / "m.safetensors")
    other = sw.load(tmp_path / "m.safetensors", nn.Linear(3, 4, bias=False))
    assert torch.equal(sw.masks(other)["weight"], record["weight"])
