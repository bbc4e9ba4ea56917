"""Parquet files, read by pyarrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseworks.core.errors import DataError, MissingDependency

__all__ = ["column_names", "read_parquet"]


def read_parquet(path: Path) -> Any:
    """The table of a parquet file.

    Raises:
        DataError: it is none.
        MissingDependency: pyarrow is not installed.
    """
    return _read("read_table", path)


def column_names(path: Path) -> list[str]:
    """The names of the columns of a parquet file, from its end alone; raises as `read_parquet`."""
    return list(_read("read_schema", path).names)


def _read(what: str, path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise MissingDependency(
            "parquet files need pyarrow: pip install 'sparseworks[data]'"
        ) from None
    try:
        return getattr(parquet, what)(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({error})") from None
