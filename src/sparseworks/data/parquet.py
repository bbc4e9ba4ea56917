"""Parquet files, read by pyarrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseworks.core.errors import DataError, MissingDependency

__all__ = ["read_parquet"]


def read_parquet(path: Path) -> Any:
    """The table of a parquet file.

    Raises:
        DataError: it is none.
        MissingDependency: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import read_table
    except ImportError:
        raise MissingDependency(
            "parquet files need pyarrow: pip install 'sparseworks[data]'"
        ) from None
    try:
        return read_table(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({error})") from None
