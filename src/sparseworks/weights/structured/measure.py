"""Latency in torch and onnxruntime."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseworks.io.onnx import export_onnx, onnx_session
from sparseworks.models.calls import Arguments, Example, call
from sparseworks.models.modes import evaluating

__all__ = ["export_onnx", "latency", "onnx_latency"]


@torch.no_grad()
def latency(model: nn.Module, example: Example, repeats: int = 7) -> float:
    """Median seconds of one call in evaluation mode, after two calls to warm up."""
    given = Arguments.of(example)
    with evaluating(model):
        for _ in range(2):
            call(model, given)
        times = []
        for _ in range(repeats):
            _wait(given)
            start = time.perf_counter()
            call(model, given)
            _wait(given)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(given: Arguments) -> None:
    if any(isinstance(v, Tensor) and v.is_cuda for v in given.values):
        torch.cuda.synchronize()


def onnx_latency(path: str | Path, example: Example, repeats: int = 7) -> float:
    """Median seconds of one call in onnxruntime on the CPU.

    Raises:
        MissingDependency: onnxruntime is not installed.
    """
    session = onnx_session(path)
    values = Arguments.of(example).values
    arrays = [v.detach().cpu().numpy() for v in values if isinstance(v, Tensor)]
    feed = {i.name: a for i, a in zip(session.get_inputs(), arrays)}
    for _ in range(2):
        session.run(None, feed)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
