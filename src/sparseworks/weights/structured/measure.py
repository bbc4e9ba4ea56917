"""Latency in torch and onnxruntime, and the ONNX file itself."""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseworks.core.errors import MissingDependency
from sparseworks.models.calls import Arguments, Example, call

__all__ = ["export_onnx", "latency", "onnx_latency"]


@torch.no_grad()
def latency(model: nn.Module, example: Example, repeats: int = 7) -> float:
    """Median seconds of one call in evaluation mode, after two calls to warm up."""
    given = Arguments.of(example)
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        for _ in range(2):
            call(model, given)
        times = []
        for _ in range(repeats):
            _wait(given)
            start = time.perf_counter()
            call(model, given)
            _wait(given)
            times.append(time.perf_counter() - start)
    finally:
        for module, was in training.items():
            module.training = was
    return statistics.median(times)


def _wait(given: Arguments) -> None:
    if any(isinstance(v, Tensor) and v.is_cuda for v in given.values):
        torch.cuda.synchronize()


def export_onnx(model: nn.Module, example: Example, path: str | Path) -> Path:
    """Write an ONNX file with the example's shapes (to a temporary name first).

    Raises:
        MissingDependency: onnx or onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "ONNX export needs onnx and onnxscript: pip install 'sparseworks[onnx]'"
        ) from error
    given = Arguments.of(example)
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    training = {m: m.training for m in model.modules()}
    model.eval()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every optional package that is absent
    try:
        program = torch.onnx.export(
            model,
            given.args,
            kwargs=dict(given.kwargs) or None,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(part))
        part.replace(path)
    finally:
        logger.setLevel(level)
        part.unlink(missing_ok=True)
        for module, was in training.items():
            module.training = was
    return path


def onnx_latency(path: str | Path, example: Example, repeats: int = 7) -> float:
    """Median seconds of one call in onnxruntime on the CPU.

    Raises:
        MissingDependency: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "timing ONNX needs onnxruntime: pip install 'sparseworks[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
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
