"""Times of several candidates in one run.

They take turns in short blocks, so that a noisy machine is fair to them, with a rest before each
block in which the threads of the one before go to sleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["in_turn"]

_BLOCK = 4  # calls in a row, or as many as fit into
_SPAN = 0.02  # seconds
_REST = 0.1  # seconds; idle threads of other runtimes spin for up to tens of milliseconds
_WARM = 0.03  # seconds of calls before a block; caches and clocks settle


@torch.no_grad()
def in_turn(calls: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Milliseconds of every call of every candidate, at least `repeat` each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(0, repeat, _BLOCK):
        for name, call in calls.items():
            time.sleep(_REST)
            begin = time.perf_counter()
            while time.perf_counter() - begin < _WARM:
                call()
            begin, taken = time.perf_counter(), 0
            while taken < min(_BLOCK, repeat - done) or time.perf_counter() - begin < _SPAN:
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e3)
                taken += 1
    return times
