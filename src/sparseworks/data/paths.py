"""Files that are named: there, or refused."""

from __future__ import annotations

import os
from pathlib import Path

from sparseworks.core.errors import DataError

__all__ = ["existing"]


def existing(source: str | os.PathLike[str]) -> Path:
    """The path of a file or folder.

    Raises:
        DataError: there is none.
    """
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    return path
