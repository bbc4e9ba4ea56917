"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["megabytes"]


def megabytes(count: float) -> str:
    """Bytes in MB of 10^6 bytes."""
    return f"{count / 1e6:.1f} MB"
