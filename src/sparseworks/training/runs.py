"""Finished trainings, kept under the hash of what they were.

A run is described before it starts by plain JSON values; its folder is named by the hash of that
description and appears at once, whole, when the run is over:

    folder/<hash>/run.json              name, description, figures
    folder/<hash>/weights.safetensors   weights, buffers and masks, packed without loss

So a process that is killed at any moment leaves only finished runs behind, and the next one skips
them. Without a folder, runs are kept in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import CheckpointError
from sparseworks.core.masks import Masks, attach, masks
from sparseworks.io.temporary import sweep

__all__ = ["Finished", "Store", "digest_of", "digest_of_masks", "digest_of_model"]

_DESCRIPTION, _WEIGHTS = "run.json", "weights.safetensors"


def digest_of(description: Mapping[str, Any]) -> str:
    """The hash of a description of JSON values, 16 hexadecimal digits."""
    text = json.dumps(description, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest_of_masks(record: Masks | None) -> str:
    """The hash of which weights are kept; "" without a record."""
    if record is None:
        return ""
    h = hashlib.blake2b(digest_size=8)
    for name in sorted(record):
        entry = record.entry(name)
        h.update(f"{name} {entry.shape}".encode())
        h.update(entry.packed.numpy().tobytes())
    return h.hexdigest()


def digest_of_model(model: nn.Module) -> str:
    """The hash of a model: class, names, dtypes, shapes, every bit of its tensors, masks."""
    h = hashlib.blake2b(f"{type(model).__name__} {digest_of_masks(masks(model))}".encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            h.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()[:16]


@dataclass(frozen=True)
class Finished:
    """A training that is over.

    Attributes:
        name: what the experiment called it.
        digest: hash of its description, the name of its folder.
        description: what it was, in JSON values.
        figures: what was measured: "score", "sparsity", "steps", ...
    """

    name: str
    digest: str
    description: Mapping[str, Any]
    figures: Mapping[str, float]
    store: Store = field(repr=False, compare=False)

    def into(self, model: nn.Module) -> nn.Module:
        """Fill a model with the weights, buffers and masks of this run; returns it."""
        self.store.fill(self.digest, model)
        return model


class Store:
    """Where finished runs are: a folder that processes may share, or memory."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._kept: dict[str, tuple[dict[str, Tensor], Masks | None, dict[str, Any]]] = {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)

    def find(self, digest: str) -> dict[str, Any] | None:
        """What run.json of a finished run says, or None when there is no such run.

        Raises:
            CheckpointError: the file is damaged or not of this run.
        """
        if self.folder is None:
            return self._kept[digest][2] if digest in self._kept else None
        path = self.folder / digest / _DESCRIPTION
        if not path.is_file():
            return None
        try:
            said = json.loads(path.read_text())
            whole = digest_of(said["description"]) == digest and "figures" in said
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise CheckpointError(
                f"{path}: damaged or edited; remove the folder {path.parent} to train it again"
            )
        return dict(said)

    def keep(self, finished: Finished, model: nn.Module) -> None:
        """Keep a run and its model; on disk, its folder appears whole."""
        said = {
            "name": finished.name,
            "description": dict(finished.description),
            "figures": dict(finished.figures),
        }
        if self.folder is None:
            state = {k: v.detach().clone() for k, v in model.state_dict().items()}
            self._kept[finished.digest] = state, masks(model), said
            return
        from sparseworks.io.atomic import atomic_folder
        from sparseworks.io.saving import save

        try:
            with atomic_folder(self.folder / finished.digest, last=_DESCRIPTION) as place:
                save(model, place / _WEIGHTS)
                (place / _DESCRIPTION).write_text(json.dumps(said, indent=1) + "\n")
        except CheckpointError:
            if self.find(finished.digest) is None:  # else another process was first: all is there
                raise

    def fill(self, digest: str, model: nn.Module) -> None:
        """Put the weights, buffers and masks of a finished run into a model."""
        if self.folder is None:
            state, record, _ = self._kept[digest]
            model.load_state_dict(state)
            attach(model, record)
            return
        from sparseworks.io.loading import load

        load(self.folder / digest / _WEIGHTS, model)

    def note(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file beside the runs; nothing in memory."""
        if self.folder is None:
            return
        from sparseworks.io.atomic import atomic_file

        with atomic_file(self.folder / name) as place:
            place.write_text(json.dumps(value, indent=1) + "\n")
