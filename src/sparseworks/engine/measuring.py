"""Times and errors of candidates."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "difference",
    "interleaved_ms",
    "least_seconds",
    "median_ms",
    "one_thread",
    "tensors_of",
]


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch alone on this thread, so that its idle threads do not spin beside the native ones."""
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


@torch.no_grad()
def median_ms(run: Callable[[], Any]) -> float:
    """Median time of one candidate."""
    return interleaved_ms(run)[0]


def least_seconds(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least time of each candidate, taken in turn: other work on the machine only adds."""
    least = dict.fromkeys(runs, math.inf)
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


@torch.no_grad()
def interleaved_ms(*runs: Callable[[], Any], repeats: int = 7) -> list[float]:
    """Medians of several candidates, measured in turn so that a noisy machine is fair to all."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            times[i].append((time.perf_counter() - start) * 1e3)
    return [statistics.median(t) for t in times]


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in tensors_of(part)]
    return []


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """max |y - y'| / max |y|."""
    return max(
        (
            float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
            for a, b in zip(expected, found)
            if a.numel()
        ),
        default=0.0,
    )
