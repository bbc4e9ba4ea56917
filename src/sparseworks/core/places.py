"""Where in a file an error came from, for messages about code of others."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Collection

__all__ = ["place_of", "said"]


def place_of(error: BaseException, files: Collection[str] = ()) -> str:
    """ "file:line" of the last line that an error passed; "" where it passed none.

    Args:
        error: that was raised, with its traceback.
        files: the only ones that count; none given: all but Python's own import machinery.
    """
    if isinstance(error, SyntaxError) and (not files or error.filename in files):
        return f"{error.filename}:{error.lineno}"
    machinery = ("<frozen", importlib.__file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        name = frame.filename
        if name in files or (not files and not name.startswith(machinery)):
            return f"{name}:{frame.lineno}"
    return ""


def said(error: BaseException) -> str:
    """ "NameError: ..." in one line."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"
