"""Where weights are while others are at work, and the hidden states between blocks."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseworks.models.matrix import View

__all__ = ["HiddenStates", "KeptHiddenStates", "Residence"]


class HiddenStates:
    """Hidden states of each batch, in memory or in memory-mapped files of a folder."""

    def __init__(self, spill: str | os.PathLike[str] | None) -> None:
        self._folder = None if spill is None else tempfile.TemporaryDirectory(dir=spill)
        self._tensors: dict[int, Tensor] = {}

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *exception: object) -> None:
        self._tensors.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __getitem__(self, index: int) -> Tensor:
        return self._tensors[index]

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        self._tensors[index] = self._keep(index, hidden)

    def _keep(self, index: int, hidden: Tensor) -> Tensor:
        if self._folder is None:
            return hidden
        path = os.path.join(self._folder.name, f"{index}.{id(hidden)}")
        size = math.prod(hidden.shape)
        mapped = torch.from_file(path, shared=True, size=size, dtype=hidden.dtype)
        os.unlink(path)  # the mapping keeps it until the tensor goes
        mapped.copy_(hidden.detach().reshape(-1))
        return mapped.view(hidden.shape)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    def resume(self, finished: int) -> int:
        """The block whose inputs these are now, of which the first `finished` are done."""
        return 0

    def passed(self, position: int) -> None:
        """These are the inputs of the block at `position` now, all of them."""

    def forget(self, position: int) -> None:
        """Inputs of the blocks before `position` are not needed any more."""


class KeptHiddenStates(HiddenStates):
    """Hidden states in files that outlive the process, so that a later one goes on with them.

    Args:
        folder: theirs alone; it is removed by its owner.
        part: of the name of the file that says they are complete, where several processes share
            the folder.
    """

    def __init__(self, folder: Path, part: str = "0") -> None:
        super().__init__(None)
        self.folder, self.part = folder, part
        folder.mkdir(parents=True, exist_ok=True)
        self._position = 0

    def __exit__(self, *exception: object) -> None:
        self._tensors.clear()

    def _keep(self, index: int, hidden: Tensor) -> Tensor:
        path = self.folder / f"{self._position}-{index}"
        values = hidden.detach().cpu().contiguous()
        with open(path, "wb") as file:
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        return self._map(path, values.dtype, values.shape)

    @staticmethod
    def _map(path: Path, dtype: torch.dtype, shape: torch.Size | list[int]) -> Tensor:
        flat = torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype)
        return flat.view(shape)

    def passed(self, position: int) -> None:
        described = {
            i: [str(t.dtype).removeprefix("torch."), list(t.shape)]
            for i, t in self._tensors.items()
        }
        temporary = self.folder / f"{position}.{self.part}.new"
        temporary.write_text(json.dumps(described))
        os.replace(temporary, self._complete(position))
        self._position = position + 1

    def _complete(self, position: int) -> Path:
        return self.folder / f"{position}.{self.part}.json"

    def forget(self, position: int) -> None:
        for before in range(position):
            if self._complete(before).is_file():
                self._complete(before).unlink()
                for index in self._tensors:
                    (self.folder / f"{before}-{index}").unlink(missing_ok=True)

    def resume(self, finished: int) -> int:
        for position in range(finished, 0, -1):
            if self._complete(position).is_file():
                described = json.loads(self._complete(position).read_text())
                if {int(i) for i in described} == set(self._tensors):
                    for i, (dtype, shape) in described.items():
                        path = self.folder / f"{position}-{i}"
                        self._tensors[int(i)] = self._map(path, getattr(torch, dtype), shape)
                    self._position = position + 1
                    return position
        return 0


class Residence:
    """All weights are in memory, or wherever the model has them, all the time."""

    lazy = False
    """Whether blocks come and go."""

    @contextmanager
    def resident(self, name: str, module: nn.Module, dense: bool = False) -> Iterator[None]:
        """A module's weights are at hand; what was done to them counts when this ends well.

        Args:
            dense: as they were before anything was pruned.
        """
        yield

    def place(self, view: View) -> tuple[str, nn.Module]:
        """What has to be resident for a weight to be there."""
        return view.module_name, view.module

    def finished(self, name: str) -> bool:
        """Was this module done by an earlier call?"""
        return False

    def hidden(self, name: str, spill: str | os.PathLike[str] | None) -> HiddenStates:
        """A store for the hidden states between the blocks of a stack."""
        return HiddenStates(spill)
