"""Latency in torch and onnxruntime."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.io.onnx import export_onnx, onnx_session
from sparseworks.models.calls import Batch, call, split

__all__ = ["export_onnx", "latency", "onnx_latency"]


@torch.no_grad()
def latency(model: nn.Module, example: Batch, repeats: int = 7) -> float:
    """Median seconds of one call in evaluation mode, after two calls to warm up."""
    inputs, _ = split(example)
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        for _ in range(2):
            call(model, inputs)
        times = []
        for _ in range(repeats):
            _wait(inputs)
            start = time.perf_counter()
            call(model, inputs)
            _wait(inputs)
            times.append(time.perf_counter() - start)
    finally:
        for module, was in training.items():
            module.training = was
    return statistics.median(times)


def _wait(inputs: Any) -> None:
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    if any(isinstance(v, Tensor) and v.is_cuda for v in values):
        torch.cuda.synchronize()


def onnx_latency(path: str | Path, example: Batch, repeats: int = 7) -> float:
    """Median seconds of one call in onnxruntime on the CPU.

    Raises:
        MissingDependency: onnxruntime is not installed.
    """
    session = onnx_session(path)
    inputs, _ = split(example)
    values = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
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
