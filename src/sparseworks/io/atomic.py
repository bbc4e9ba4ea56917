"""Files that are either whole or not there.

A file is written under a temporary name in the folder where it will live (a rename is atomic
only within one file system), flushed to the disk, then renamed. Whatever stood there before is
untouched until that moment. What a killed process left is removed when its target is next written.
A folder that does not exist yet is made, and goes again where the writing fails.
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
    "check_place",
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


def check_place(path: Path) -> None:
    """Raise where `path` cannot be written, because of what is in the place of its folders.

    Raises:
        CheckpointError: one of them is a file, or may not be written to.
    """
    above = path.absolute().parent
    while not (above.exists() or above.is_symlink()):
        above = above.parent
    if not above.is_dir():
        raise CheckpointError(f"{path}: {above} is not a folder; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path}: {above} may not be written to; choose another place")


@contextlib.contextmanager
def _parent(path: Path) -> Iterator[Path]:
    """The folder of `path`, made where it is missing; what was made goes when the block fails."""
    check_place(path)
    folder = path.parent
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException as error:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    for made in (folder, *(p.parent for p in missing)):
        sync_folder(made)


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
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; a file cannot take its place")
    with _parent(path):
        temporary = _temporary(path)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, last: str) -> Iterator[Path]:
    """A temporary folder to fill; its files become those of `path` when the block ends well.

    A folder that did not exist appears at once. Into one that exists the files are renamed one by
    one, each atomically, and `last` (the weights) after all others; files of other names stay.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; a folder cannot take its place")
    with _parent(path):
        temporary = _temporary(path)
        try:
            temporary.mkdir()
            yield temporary
            files = _flushed(temporary)
            if not path.exists():
                os.rename(temporary, path)
            else:
                _move(files, temporary, path, last)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_files(path: Path) -> Iterator[Path]:
    """A temporary folder for a file of the name of `path` and others that belong to it; when the
    block ends well each is renamed to the folder of `path`, which comes last."""
    with _parent(path) as parent:
        temporary = _temporary(path)
        try:
            temporary.mkdir()
            yield temporary
            _move(_flushed(temporary), temporary, parent, path.name)
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
    with _parent(path):
        temporary = _temporary(path)
        old = hidden_name(path)
        try:
            temporary.mkdir()
            yield temporary
            if path.exists() and not _exchanged(temporary, path):
                os.rename(path, old)  # between the two nothing is at the path
            if temporary.exists() and not path.exists():
                os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
