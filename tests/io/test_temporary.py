"""What a killed process left goes when its target is next written; what one is writing stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import sparseworks as sw
from sparseworks.io.atomic import atomic_file, atomic_folder, replaced_folder
from sparseworks.io.temporary import hidden_name, sweep

KINDS = ("atomic_file", "atomic_folder", "replaced_folder")
WRITE = """
    import sys
    from pathlib import Path
    from sparseworks.io.atomic import atomic_file, atomic_folder, replaced_folder
    kind, target = sys.argv[1], Path(sys.argv[2])
    more = {"last": "x"} if kind == "atomic_folder" else {}
    with globals()[kind](target, **more) as place:
        (place if kind == "atomic_file" else place / "x").write_text("theirs")
        print("writing", flush=True)
        sys.stdin.readline()
"""


def writing(kind: str, target: Path) -> subprocess.Popen[str]:
    """Another process, halfway; it goes on after a line on its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITE), kind, str(target)],
        env={**os.environ, "PYTHONPATH": str(Path(sw.__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def write(kind: str, target: Path) -> None:
    made: dict[str, AbstractContextManager[Path]] = {
        "atomic_file": atomic_file(target),
        "atomic_folder": atomic_folder(target, last="x"),
        "replaced_folder": replaced_folder(target),
    }
    with made[kind] as place:
        (place if kind == "atomic_file" else place / "x").write_text("ours")


def hidden(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.startswith(".")]


def read(kind: str, target: Path) -> str:
    return (target if kind == "atomic_file" else target / "x").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path, kind):
    target, other = tmp_path / "m", tmp_path / "m.n"
    for path in (target, other):
        process = writing(kind, path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(hidden(tmp_path)) == 2
    write(kind, target)
    (left,) = hidden(tmp_path)
    assert left.name.startswith(".m.n.")  # another target's, which is not ours to judge
    assert read(kind, target) == "ours"
    sweep(tmp_path)
    assert not hidden(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_at_work_is_not_disturbed(tmp_path, kind):
    target = tmp_path / "m"
    process = writing(kind, target)
    write(kind, target)
    sweep(tmp_path)
    assert read(kind, target) == "ours" and len(hidden(tmp_path)) == 1
    process.communicate("go on\n")
    assert process.returncode == 0 and read(kind, target) == "theirs" and not hidden(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_this_process_may_write_one_target_within_another_write(tmp_path, kind):
    target = tmp_path / "m"
    with atomic_file(target) if kind == "atomic_file" else replaced_folder(target) as place:
        write(kind, target)
        (place if kind == "atomic_file" else place / "x").write_text("outer")
    assert read(kind, target) == "outer" and not hidden(tmp_path)


def test_a_later_process_of_the_same_number_is_another(tmp_path):
    name = hidden_name(tmp_path / "m").name
    mine, before = tmp_path / name, tmp_path / re.sub(r"-(\d+)\.", r"-1\1.", name, count=1)
    if Path("/proc/self/stat").exists():
        mine.touch()
        before.touch()
        sweep(tmp_path, "m")
        assert mine.exists() and not before.exists()


@pytest.mark.parametrize("owner", ["000000-1-1.01234567", "0123456789ab"])
@pytest.mark.parametrize("folder", [True, False])
def test_what_is_of_another_machine_stays_a_day(tmp_path, owner, folder):
    left = tmp_path / f".m.{owner}.tmp"
    file = left / "weights" if folder else left
    file.parent.mkdir(exist_ok=True)
    file.touch()
    os.utime(left, (0, 0))
    if folder:  # written in a moment ago, however old the folder
        sweep(tmp_path, "m")
        assert file.exists()
        os.utime(file, (0, 0))
    sweep(tmp_path, "n")
    assert file.exists()
    sweep(tmp_path, "m")
    assert not left.exists()


@pytest.mark.parametrize("name", [".m.tmp", ".m.x.tmp", ".m", "m.0123456789ab.tmp", ".m.sw_p.tmp"])
def test_files_of_others_stay(tmp_path, name):
    (tmp_path / name).touch()
    os.utime(tmp_path / name, (0, 0))
    sweep(tmp_path, "m")
    sweep(tmp_path)
    assert (tmp_path / name).exists()


def test_a_replaced_folder_keeps_nothing_of_the_old_one(tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), replaced_folder(target) as place:
        (place / "new").touch()
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["old"]
    with replaced_folder(target) as place:
        (place / "new").touch()
    assert [p.name for p in target.iterdir()] == ["new"] and not hidden(tmp_path)
