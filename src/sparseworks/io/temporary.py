"""Hidden names beside a target, where it is made before it takes its place; and who made them.

`.{target}.{place}-{process}-{start}.{random}.tmp`: the place is this machine (this container), and
the start of the process tells it from a later one of the same number. What a killed process left is
removed when the same target is next written, while a process that is still at work keeps its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from functools import cache
from pathlib import Path

__all__ = ["hidden_name", "sweep"]

_OWNED = r"([0-9a-f]{6})-(\d+)-(\d+)\.[0-9a-f]{8}\.tmp"
_UNOWNED = r"[0-9a-f]{12}\.tmp"
_DAY = 24 * 3600


def hidden_name(target: Path) -> Path:
    """A new hidden name beside `target`, of this process; nothing is made there."""
    process = os.getpid()
    owner = f"{_place()}-{process}-{_start(process)[0]}"
    return target.with_name(f".{target.name}.{owner}.{uuid.uuid4().hex[:8]}.tmp")


def sweep(folder: Path, target: str | None = None) -> None:
    """Remove what processes that are gone left half written in a folder.

    Where nothing tells whether the owner lives (it ran on another machine), what was last written a
    day ago is removed.

    Args:
        folder: which of its direct entries are looked at.
        target: only of this name; None: of any.
    """
    name = ".+" if target is None else re.escape(target)
    pattern = re.compile(rf"\.{name}\.(?:{_OWNED}|{_UNOWNED})")
    with contextlib.suppress(OSError):
        for left in list(folder.iterdir()):
            found = pattern.fullmatch(left.name)
            if found is not None and _is_stale(left, *found.groups()):
                _remove(left)


def _is_stale(left: Path, place: str | None, process: str, start: str) -> bool:
    if place == _place():
        return not _is_alive(int(process), int(start))
    try:
        inside = [*left.iterdir()] if left.is_dir() else []
        written = max(p.lstat().st_mtime for p in (left, *inside))
    except OSError:  # its owner has just finished
        return False
    return time.time() - written > _DAY


def _is_alive(process: int, start: int) -> bool:
    """Whether the process that began at `start` still runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    began, state = _start(process)
    return state not in "ZX" and began in (start, 0)


def _start(process: int) -> tuple[int, str]:
    """When a process began, in ticks since the machine did, and its state; (0, "?") if unknown."""
    try:
        said = Path(f"/proc/{process}/stat").read_text()
        words = said.rpartition(")")[2].split()  # the name before may hold spaces
        return int(words[19]), words[0]
    except (OSError, ValueError, IndexError):
        return 0, "?"


@cache
def _place() -> str:
    """Where numbers of processes mean the same: the machine, and the container in it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:6]


def _remove(left: Path) -> None:
    with contextlib.suppress(OSError):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
