"""What Linux says of the memory of this process."""

from __future__ import annotations

from pathlib import Path

__all__ = ["begin_peak", "kilobytes", "told"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def told() -> bool:
    """Whether the system tells resident sizes (it is Linux)."""
    return _STATUS.is_file()


def kilobytes(field: str) -> int:
    """A field of /proc/self/status in its unit: VmRSS, resident now; VmHWM, at the peak."""
    lines = _STATUS.read_text().splitlines()
    return int(next(x for x in lines if x.startswith(f"{field}:")).split()[1])


def begin_peak() -> None:
    """The peak starts again from what is resident now."""
    _RESET.write_text("5")
