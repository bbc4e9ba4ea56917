"""Dense safetensors that others wrote: one file, or the shards of a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseworks.core.errors import CheckpointError
from sparseworks.io.checkpoint import Checkpoint, Stored
from sparseworks.io.container import Container, Part
from sparseworks.io.encoding import SLICE

__all__ = ["PlainCheckpoint", "read_json", "shards"]


class PlainCheckpoint(Checkpoint):
    """Tensors of one or more plain safetensors files; these carry no hashes to check.

    Raises:
        CheckpointError: two files hold a tensor of the same name.
    """

    kind = "safetensors"

    def __init__(self, path: Path, files: Mapping[Path, Container]) -> None:
        super().__init__(path)
        self._files = dict(files)
        self.ties: dict[str, str] = {}
        self._where: dict[str, tuple[Container, Part]] = {}
        for file, container in self._files.items():
            for name, part in container.parts.items():
                if name in self._where:
                    raise CheckpointError(f"{file}: tensor {name!r} is in another shard too")
                self._where[name] = container, part
            self.ties |= {
                alias: name
                for alias, name in container.metadata.items()
                if name in container.parts and alias not in container.parts and alias != "format"
            }
        self.tensors = {
            name: Stored(p.dtype, p.shape, "dense", p.nbytes)
            for name, (_, p) in self._where.items()
        }
        self.file_bytes = sum(p.stat().st_size for p in self._files)

    def verify(self, name: str) -> None:
        """Nothing to check beyond the header."""

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        container, part = self._where[name]
        for start in range(0, self.tensors[name].numel, SLICE):
            count = min(SLICE, self.tensors[name].numel - start)
            yield start, container.elements(part, start, count)

    def mapped(self, name: str) -> Tensor:
        """The whole tensor as it lies in its file (see `Container.mapped`)."""
        container, part = self._where[name]
        return container.mapped(part)

    def close(self) -> None:
        for container in self._files.values():
            container.close()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return found


def shards(folder: Path, index: Path) -> dict[Path, Container]:
    """The files that an index of shards names, open."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{index}: has no weight_map of names to files")
    files: dict[Path, Container] = {}
    try:
        for name, file in places.items():
            path = folder / file
            if Path(file).name != file:
                raise CheckpointError(
                    f"{index}: tensor {name!r} is in {file!r}, outside the folder"
                )
            if path not in files:
                if not path.is_file():
                    raise CheckpointError(f"{index}: tensor {name!r} is in {file!r}: no such file")
                files[path] = Container(path)
            if name not in files[path].parts:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is missing; the index says it is here"
                )
    except BaseException:
        for container in files.values():
            container.close()
        raise
    return files
