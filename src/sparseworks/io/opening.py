"""Which checkpoint is at a path: a packed file, plain safetensors, or a folder of either."""

from __future__ import annotations

import os
from pathlib import Path

from sparseworks.core.errors import CheckpointError
from sparseworks.io.bitmask import FORMATS, BitmaskCheckpoint, sparsity_format
from sparseworks.io.checkpoint import Checkpoint
from sparseworks.io.container import Container, refuse_pickle
from sparseworks.io.packed import PackedCheckpoint
from sparseworks.io.plain import PlainCheckpoint, read_json, shards

__all__ = ["PACKED_NAME", "open_checkpoint"]

PACKED_NAME = "sparseworks.safetensors"
"""The packed file of a folder. Tools that do not know it find no weights and say so, instead of
reading a part of them."""
_PLAIN_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint and check everything that its headers can tell.

    Raises:
        CheckpointError: nothing there, a pickle, or not sound.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    refuse_pickle(path)
    return _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    container = Container(path)
    try:
        if PackedCheckpoint.recognises(container):
            return PackedCheckpoint(container)
        return PlainCheckpoint(path, {path: container})
    except BaseException:
        container.close()
        raise


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / PACKED_NAME).is_file():
        return _open_file(folder / PACKED_NAME)
    for name in (_PLAIN_NAME, _INDEX_NAME):
        if (folder / name).is_file():
            return _open_plain_folder(folder, folder / name)
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth")]
    if pickles:
        refuse_pickle(folder / pickles[0])
    raise CheckpointError(
        f"{folder}: no weights: neither {PACKED_NAME} nor {_PLAIN_NAME} nor {_INDEX_NAME}"
    )


def _open_plain_folder(folder: Path, first: Path) -> Checkpoint:
    """The checkpoint of a folder, from its model.safetensors or its index of shards."""
    config = folder / "config.json"
    format = sparsity_format(read_json(config)) if config.is_file() else ""
    files = {first: Container(first)} if first.suffix == ".safetensors" else shards(folder, first)
    try:
        plain = PlainCheckpoint(folder, files)
        if format in FORMATS:
            return BitmaskCheckpoint(plain, format)
        if format not in ("", "dense"):
            raise CheckpointError(
                f"{folder}: compressed-tensors format {format!r} is not read; only {FORMATS} are"
            )
    except BaseException:
        for container in files.values():
            container.close()
        raise
    return plain
