"""What was made for sizes that were met, kept until it takes too many bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

__all__ = ["LIMIT", "Recent"]

LIMIT = 8 << 20  # bytes of one model, unless its caller says otherwise


class Recent:
    """Values by key: the least recently used go first where all take more than `limit` bytes.

    Safe to use from several threads; two that miss the same key at once both make it.

    Args:
        limit: in bytes; a value that takes more by itself is not kept.

    Attributes:
        bytes: that all values take.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.bytes = limit, 0
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], tuple[Any, int]]) -> Any:
        """The value of a key; `make` gives it, and its bytes, where it is not here."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                return found[0]
        value, size = make()
        with self._lock:
            self._drop(key)
            if size <= self.limit:
                self._held[key] = value, size
                self.bytes += size
            while self.bytes > self.limit:
                self._drop(next(iter(self._held)))
        return value

    def _drop(self, key: Hashable) -> None:
        if key in self._held:
            self.bytes -= self._held.pop(key)[1]

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held
