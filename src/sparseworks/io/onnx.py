"""A model as an ONNX file, and a session of onnxruntime on one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseworks.core.errors import MissingDependency
from sparseworks.io.atomic import atomic_files
from sparseworks.models.calls import Arguments, Example
from sparseworks.models.modes import evaluating

__all__ = ["export_onnx", "onnx_session", "write_onnx"]


def export_onnx(model: nn.Module, example: Example, path: str | Path) -> Path:
    """Write an ONNX file with the example's shapes, in evaluation mode.

    Returns:
        The path. Weights of more than 2 GB lie beside it, in a file of its name and ".data".

    Raises:
        MissingDependency: onnx or onnxscript is not installed.
        CheckpointError: the file cannot be written.
    """
    given = Arguments.of(example)
    return write_onnx(model, given.args, dict(given.kwargs), path)


def write_onnx(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str | Path
) -> Path:
    """`export_onnx` of the call `model(*args, **kwargs)`."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "ONNX export needs onnx and onnxscript: pip install onnx onnxscript"
        ) from error
    path = Path(path)
    with atomic_files(path) as place, evaluating(model), _quiet():
        program = torch.onnx.export(model, args, kwargs=kwargs or None, dynamo=True, verbose=False)
        assert program is not None
        program.save(str(place / path.name))
    return path


def onnx_session(path: str | Path, threads: int | None = None) -> Any:
    """A session on the CPU.

    Args:
        path: of an ONNX file.
        threads: None: as many as torch uses.

    Raises:
        MissingDependency: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "running ONNX needs onnxruntime: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of every optional package that is absent."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
