"""A save that fails or is killed leaves what was there; a good one survives the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError
from sparseworks.core.masks import Masks
from sparseworks.io.atomic import atomic_file, atomic_files, atomic_folder, replaced_folder


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    source = str(Path(sw.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_fresh_process_reads_the_same_bits(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)).bfloat16()
    mask = torch.rand(30, 40) < 0.1
    record = Masks.of({"0.weight": mask}, "wanda", "row")
    record.apply(model)
    sw.attach(model, record)
    sw.save(model, tmp_path / "m.safetensors")
    out = python(
        """
        import sys, hashlib, torch, sparseworks as sw
        from torch import nn
        model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)).bfloat16()
        sw.load(sys.argv[1], model)
        h = hashlib.sha256()
        for t in model.state_dict().values():
            h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
        m = sw.masks(model)
        h.update(m["0.weight"].numpy().tobytes())
        print(h.hexdigest(), m.method, m.entry("0.weight").pattern)
        """,
        tmp_path / "m.safetensors",
    )
    import hashlib

    h = hashlib.sha256()
    for t in model.state_dict().values():
        h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    h.update(mask.numpy().tobytes())
    assert out.stdout.split() == [h.hexdigest(), "wanda", "row"], out.stderr


def test_killed_midway_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.safetensors"
    old = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sw.save(old, path)
    before = path.read_bytes()
    out = python(
        """
        import os, signal, sys, sparseworks as sw
        from torch import nn
        def kill(done, total, name):
            if done == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        sw.save(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), sys.argv[1], progress=kill)
        """,
        path,
    )
    assert out.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    sw.load(path, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "m.safetensors"
    sw.save(nn.Linear(8, 8), path)
    before = path.read_bytes()

    def stop(done: int, total: int, name: str) -> None:
        if done == 1:
            raise error

    with pytest.raises(error):
        sw.save(nn.Linear(8, 8), path, progress=stop)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_interrupted_while_checking_leaves_the_model(tmp_path):
    path = tmp_path / "m.safetensors"
    sw.save(nn.Linear(8, 8), path)
    model = nn.Linear(8, 8)
    before = model.weight.clone()

    def stop(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sw.load(path, model, progress=stop)
    assert torch.equal(model.weight, before)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 10, 5))
    with pytest.raises(CheckpointError, match=r"the disk has 0\.0 MB free"):
        sw.save(nn.Linear(8, 8), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_write_error_is_named(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(CheckpointError, match="No space left"):
        sw.save(nn.Linear(8, 8), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_progress_counts_to_its_total(tmp_path):
    seen: list[tuple[int, int, str]] = []
    sw.save(nn.Linear(8, 8), tmp_path / "m.safetensors", progress=lambda *a: seen.append(a))
    sw.load(tmp_path / "m.safetensors", nn.Linear(8, 8), progress=lambda *a: seen.append(a))
    assert seen[-1][0] == seen[-1][1] and all(d <= t for d, t, _ in seen)


def test_a_read_error_halfway_says_that_the_model_is_filled_in_part(tmp_path, monkeypatch):
    """After every check has passed the disk fails: no mask record may claim what is not there."""
    from sparseworks.io.packed import PackedCheckpoint

    path = tmp_path / "m.safetensors"
    sw.save(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), path)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sw.attach(model, Masks.of({"0.weight": torch.rand(8, 8) < 0.5}))
    slices = PackedCheckpoint.slices

    def fail(self: PackedCheckpoint, name: str) -> object:
        if name == "1.weight":
            raise CheckpointError("disk")
        return slices(self, name)

    monkeypatch.setattr(PackedCheckpoint, "slices", fail)
    with pytest.raises(CheckpointError, match="disk") as error:
        sw.load(path, model)
    assert "filled in part" in error.value.__notes__[0] and sw.masks(model) is None


def test_a_reader_of_the_old_file_keeps_it(tmp_path):
    """The new file takes the old one's place; it does not write into it."""
    path = tmp_path / "m.safetensors"
    sw.save(nn.Linear(8, 8), path)
    before = path.read_bytes()
    with open(path, "rb") as reader:
        sw.save(nn.Linear(8, 8), path)
        assert reader.read() == before != path.read_bytes()


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda d: (events.append("sync"), fsync(d))[1])
    monkeypatch.setattr("os.replace", lambda a, b: (events.append("name"), replace(a, b))[1])
    sw.save(nn.Linear(8, 8), tmp_path / "m.safetensors")
    assert events == ["sync", "name", "sync"]  # the file, its name, the folder


WRITERS = {
    "file": atomic_file,
    "folder": lambda path: atomic_folder(path, last="x"),
    "files": atomic_files,
    "replaced": replaced_folder,
}


def written(place: Path) -> None:
    (place / "x" if place.is_dir() else place).write_text("whole")


@pytest.mark.parametrize("kind", WRITERS)
def test_missing_folders_are_made_and_go_where_writing_fails(tmp_path, kind):
    (tmp_path / "a").mkdir()
    out = tmp_path / "a" / "b" / "c" / "x"
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with (
            pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)),
            WRITERS[kind](out) as place,
        ):
            written(place)
            raise error
        assert list((tmp_path / "a").iterdir()) == []
    with WRITERS[kind](out) as place:
        written(place)
    files = [p for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert files == [out if out.is_file() else out / "x"] and files[0].read_text() == "whole"


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, kind):
    (tmp_path / "a").write_text("mine")
    with (
        pytest.raises(CheckpointError, match=r"a is not a folder; choose another place"),
        WRITERS[kind](tmp_path / "a" / "b" / "x"),
    ):
        raise AssertionError("nothing is begun")
    assert (tmp_path / "a").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_with_other_files_stays_where_writing_fails(tmp_path):
    out = tmp_path / "a" / "x"
    with pytest.raises(KeyboardInterrupt), atomic_file(out) as place:
        written(place)
        (tmp_path / "a" / "of another").touch()
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["of another"]
