"""Files that are either whole or not there.

A file is written under a temporary name in the folder where it will live (a rename is atomic
only within one file system), flushed to the disk, then renamed. Whatever stood there before is
untouched until that moment. What a killed process left is removed when its target is next written.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparseworks.core.errors import CheckpointError
from sparseworks.io.temporary import hidden_name, sweep

__all__ = [
    "atomic_file",
    "atomic_files",
    "atomic_folder",
    "need_space",
    "replaced_folder",
    "sync_folder",
]


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary(path: Path) -> Path:
    """Where `path` is made; what killed processes left of it goes."""
    sweep(path.parent, path.name)
    return hidden_name(path)


def _parent(path: Path) -> Path:
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist; create it first")
    return path.parent


def need_space(path: Path, size: int) -> None:
    """Raise before anything is written when the disk cannot take `size` more bytes."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise CheckpointError(
            f"{path}: needs {size / 1e6:.1f} MB, but the disk has {free / 1e6:.1f} MB free"
        )


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; becomes `path` when the block ends without an error."""
    parent = _parent(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; a file cannot take its place")
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(parent)


@contextlib.contextmanager
def atomic_folder(path: Path, last: str) -> Iterator[Path]:
    """A temporary folder to fill; its files become those of `path` when the block ends well.

    A folder that did not exist appears at once. Into one that exists the files are renamed one by
    one, each atomically, and `last` (the weights) after all others; files of other names stay.
    """
    parent = _parent(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; a folder cannot take its place")
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        files = _flushed(temporary)
        if not path.exists():
            os.rename(temporary, path)
        else:
            _move(files, temporary, path, last)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(parent)


@contextlib.contextmanager
def atomic_files(path: Path) -> Iterator[Path]:
    """A temporary folder for a file of the name of `path` and others that belong to it; when the
    block ends well each is renamed to the folder of `path`, which comes last."""
    parent = _parent(path)
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        _move(_flushed(temporary), temporary, parent, path.name)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flushed(folder: Path) -> list[Path]:
    """All files below a folder, on the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    return files


def _move(files: list[Path], source: Path, target: Path, last: str) -> None:
    """Rename files of one folder into another, that of the name `last` after all others."""
    for file in sorted(files, key=lambda p: p.name == last):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    sync_folder(target)


_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def _exchanged(a: Path, b: Path) -> bool:
    """Two folders change places in one step; False where the system cannot do that."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0)


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; it takes the place of `path`, and of all that stood there, when
    the block ends well."""
    path = path.absolute()
    parent = _parent(path)
    temporary = _temporary(path)
    old = hidden_name(path)
    try:
        temporary.mkdir()
        yield temporary
        if path.exists() and not _exchanged(temporary, path):
            os.rename(path, old)  # between the two nothing is at the path
        if temporary.exists() and not path.exists():
            os.rename(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(parent)
