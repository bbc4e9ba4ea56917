"""A folder that several processes work in: who computes what, and who clears it away.

Locks are those of the operating system (flock), which go with the process that holds them: nothing
is left to be cleaned after one that was killed. Machines may share a folder where their file system
passes locks on (NFS does).

- `place/tasks/asked.json` says what all of them compute; each holds it shared while it works.
- `NAME.claim` is held by who computes a task.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from sparseworks.core.errors import InvalidArgument

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

__all__ = ["How", "Shared", "claimed"]

_ASKED = "asked.json"
How = Literal["new", "resume", "join"]


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Is the task of this file ours until the block ends? False: another process has it."""
    with path.open("w") as file:
        mine = _lock(file, alone=True)
        try:
            yield mine
        finally:
            # who opened the file before it went and locks it after looks for the answer first
            if mine:
                path.unlink(missing_ok=True)


def _lock(file: IO[str], alone: bool) -> bool:
    """Take a lock, or change the one that is held; False: others have it."""
    if fcntl is None:  # no such locks here: as if nobody else were there
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Shared:
    """The folder of a sweep's tasks, begun or taken up.

    Args:
        folder: what another sweep left there goes, if this one is "new".
        asked: what its tasks follow from, as JSON values.
        how: "new"; "resume" what was begun there; "join" it, or begin it.

    Raises:
        InvalidArgument: nothing was begun there, or something else was; or it is to be new and
            others are at work there.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], how: How) -> None:
        self.folder, self.note = folder, folder / _ASKED
        asked = json.loads(json.dumps(asked))
        if how == "new":
            self._clear()
        file = None
        while file is None:  # whoever was last may clear the folder away meanwhile
            if how == "resume" and not self.note.is_file():
                raise InvalidArgument(f"{folder}: nothing was begun there; leave --resume out")
            file = self._held(asked)
        self.file = file
        before = json.loads(self.note.read_text())
        if odd := [k for k in asked if asked[k] != before.get(k)]:
            file.close()
            raise InvalidArgument(
                f"{folder}: was begun with {odd[0]}={before.get(odd[0])!r}, not {asked[odd[0]]!r}; "
                "go on with the same options, or start anew"
            )

    def _clear(self) -> None:
        with contextlib.suppress(FileNotFoundError), self.note.open("r+") as file:
            if not _lock(file, alone=True):
                raise InvalidArgument(
                    f"{self.folder}: another process works there; --share works together with it"
                )
            shutil.rmtree(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _held(self, asked: Mapping[str, Any]) -> IO[str] | None:
        """The note, held shared; written by the first. None where it went, or is not written."""
        with contextlib.suppress(FileNotFoundError):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.note.open("a+")
            if _lock(file, alone=True) and not os.fstat(file.fileno()).st_size:
                file.write(json.dumps(asked, indent=1) + "\n")
                file.flush()
            held, opened = _lock(file, alone=False), os.fstat(file.fileno())
            if held and opened.st_size and os.path.samestat(opened, self.note.stat()):
                return file
            file.close()
        time.sleep(0.01)
        return None

    def finish(self) -> None:
        """After all answers were put where they belong: the folder is not needed, but by others who
        still read there; the last of them clears it away."""
        self._leave(only_if_empty=False)

    def abandon(self) -> None:
        """After an error: a folder that holds no answer goes, with the one around it where that is
        empty then."""
        self._leave(only_if_empty=True)

    def _leave(self, only_if_empty: bool) -> None:
        self.file.close()
        with contextlib.suppress(FileNotFoundError), self.note.open("r+") as file:
            if not _lock(file, alone=True):
                return
            if only_if_empty and any(p.name != _ASKED for p in self.folder.glob("*.json")):
                return
            shutil.rmtree(self.folder)
            if only_if_empty:
                with contextlib.suppress(OSError):
                    self.folder.parent.rmdir()
