"""What `load`, `from_pretrained` and `inspect` ask of any checkpoint, whoever wrote it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import torch
from torch import Tensor

from sparseworks.core.masks import Masks
from sparseworks.models.quantized import Grids

__all__ = ["Checkpoint", "Stored"]


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, as its header tells it.

    Args:
        dtype, shape: of the tensor that comes back.
        layout: how it is stored.
        nbytes: bytes on disk.
        nonzero: weights that are not 0, or None where only the values can tell.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str
    nbytes: int
    nonzero: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Checkpoint(ABC):
    """Named tensors on disk. Opening one checks everything that the headers can tell."""

    kind: ClassVar[str]
    tensors: Mapping[str, Stored]
    ties: Mapping[str, str]
    """Names that are the same tensor as another, stored once."""
    method: str = ""
    """What made it sparse, where that is recorded."""
    file_bytes: int = 0
    """Of the files with weights, headers included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ties = {}

    @abstractmethod
    def verify(self, name: str) -> None:
        """Raise a `CheckpointError` unless the bytes of this tensor are sound."""

    def finish_verify(self) -> None:  # noqa: B027 - most formats have nothing beyond their tensors
        """Raise a `CheckpointError` unless the rest of the checkpoint is sound."""

    @abstractmethod
    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(start, values) of consecutive slices of the flat tensor, on the CPU."""

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        stored = self.tensors[name]
        flat = torch.empty(stored.numel, dtype=stored.dtype)
        for start, values in self.slices(name):
            flat[start : start + values.numel()] = values
        return flat.view(stored.shape)

    def masks(self) -> Masks | None:
        """The mask record, or None when the checkpoint has none."""
        return None

    def grids(self) -> Grids:
        """The integers of quantized weights."""
        return Grids()

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
