"""The folder in which a model is pruned from disk: what is done, and going on after a kill.

    work/model-00001-of-0000N.safetensors   full size from the start, tensors filled in as they come
    work/masks/<unit>.safetensors           the bits of the masks of a unit
    work/journal.jsonl                      what was asked; then a line for every unit that is done
    work/hidden/                            inputs of the next block, where they are kept on disk

A unit counts as done when its line is in the journal: its tensors and masks are on the disk then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.core.masks import MaskEntry, Masks
from sparseworks.core.types import TensorResult
from sparseworks.io.atomic import atomic_file, sync_folder
from sparseworks.io.blockwise import BlockwiseModel
from sparseworks.io.container import Container
from sparseworks.io.masks_beside import FOLDER, write_beside
from sparseworks.io.shards import Shards
from sparseworks.models.ranks import Ranks
from sparseworks.models.residence import HiddenStates, KeptHiddenStates, Residence
from sparseworks.models.views import View
from sparseworks.weights.oneshot.job import Job
from sparseworks.weights.oneshot.jobs import check_finite

__all__ = ["Journal", "Staging"]


class Journal:
    """Lines of JSON, each on the disk before the next thing begins; a torn last line is none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, asked: Mapping[str, Any]) -> None:
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(asked) + "\n")

    def add(self, line: Mapping[str, Any]) -> None:
        with open(self.path, "r+b") as file:
            whole = file.read().rpartition(b"\n")[0]
            file.truncate(len(whole) + 1)
            file.seek(len(whole) + 1)
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What was asked, and the units that are done."""
        first, *lines = self.path.read_bytes().rpartition(b"\n")[0].split(b"\n")
        return json.loads(first), [json.loads(line) for line in lines]


class Staging(Residence):
    """Blocks come from the folder of the model and go into that of the result.

    Args:
        model: whose blocks these are.
        shards: of the result.
        work: the folder.
        original: names on disk are those of the source, not those of the model.
        ranks: rank 0 writes.
        keep: hidden states go to the disk and outlive the process.
    """

    lazy = True

    def __init__(
        self,
        model: BlockwiseModel,
        shards: Shards,
        work: Path,
        original: bool,
        ranks: Ranks,
        keep: Path | None,
    ) -> None:
        self.model, self.shards, self.work = model, shards, work
        self.original, self.ranks, self.keep = original, ranks, keep
        self.journal = Journal(work / "journal.jsonl")
        self.staged = shards.open()
        self.done: set[str] = set()
        self.pending: dict[str, list[View]] = {}  # unit -> its views
        self.job: Job | None = None
        self._handles: list[Any] = []

    def restore(self, job: Job, views: Sequence[View]) -> None:
        """Take up a job where the journal ends."""
        self.job = job
        for view in views:
            self.pending.setdefault(self.model.unit_of(view.name), []).append(view)
        for line in self.journal.read()[1]:
            self.done.add(line["unit"])
            job.warnings += line["warnings"]
            for made in line["results"]:
                result = TensorResult(**{**made, "shape": tuple(made["shape"])})
                job.results[result.name] = result
                job.finished.add(result.name)
            self._recall(line["unit"], line["results"])
        for unit in self.model.units:
            if unit not in self.model.blocks:
                self.model.load(unit, self.staged if unit in self.done else None)

    def _recall(self, unit: str, results: Sequence[Mapping[str, Any]]) -> None:
        """The masks of a unit as maps of their file."""
        assert self.job is not None
        if not results:
            return
        with Container(self._masks(unit)) as bits:
            entries = {
                r["name"]: MaskEntry(
                    bits.mapped(bits.parts[r["name"]]), tuple(r["shape"]), r["kept"], r["pattern"]
                )
                for r in results
            }
        self.job.record = self.job.record.merged(Masks(entries, self.job.record.method))

    def _masks(self, unit: str) -> Path:
        return self.work / FOLDER / f"{unit}.safetensors"

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While this lasts, a block that is called and is not at hand is read for that call."""
        visiting: set[str] = set()

        def before(unit: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                if unit not in self.model.held:
                    visiting.add(unit)
                    self._load(unit)

            return hook

        def after(unit: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if unit in visiting:
                    visiting.discard(unit)
                    self.model.free(unit)

            return hook

        handles = []
        for unit, block in self.model.blocks.items():
            handles += [block.register_forward_pre_hook(before(unit))]
            handles += [block.register_forward_hook(after(unit))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _load(self, unit: str) -> None:
        self.model.load(unit, self.staged if unit in self.done else None)

    @contextmanager
    def resident(self, name: str, module: nn.Module, dense: bool = False) -> Iterator[None]:
        unit = self.model.unit_of(f"{name}.weight")
        block, done = unit in self.model.blocks, unit in self.done
        if block and dense:
            self.model.load(unit)
        elif block and unit not in self.model.held:
            self._load(unit)
        if not done:
            check_finite(self.pending.get(unit, ()))
        yield
        assert self.job is not None
        complete = all(v.name in self.job.results for v in self.pending.get(unit, ()))
        if not done and unit in self.pending and complete:
            self.commit(unit)
        if block and (done or complete):
            self.model.free(unit)

    def commit(self, unit: str) -> None:
        """A unit that is at hand is as it shall be: write it, then say so."""
        assert self.job is not None
        results = [
            asdict(self.job.results[v.name])
            for v in self.pending.get(unit, ())
            if v.name in self.job.results
        ]
        if self.ranks.rank == 0:
            self.shards.write(self.model.stored(unit, self.original))
            if results:
                self._write_masks(unit, [r["name"] for r in results])
            warned = tuple(f"{r['name']}: " for r in results) or ("\0",)
            warnings = [w for w in self.job.warnings if w.startswith(warned)]
            self.journal.add({"unit": unit, "results": results, "warnings": warnings})
        self.ranks.wait()  # the others may read it from now on
        self.done.add(unit)
        self._recall(unit, results)

    def _write_masks(self, unit: str, names: Sequence[str]) -> None:
        assert self.job is not None
        record = self.job.record
        path = self._masks(unit)
        path.parent.mkdir(exist_ok=True)
        write_beside(path, Masks({n: record.entry(n) for n in names}, record.method))

    def finished(self, name: str) -> bool:
        return self.model.unit_of(f"{name}.weight") in self.done

    def place(self, view: View) -> tuple[str, nn.Module]:
        unit = self.model.unit_of(view.name)
        return unit, self.model.model.get_submodule(unit)

    def hidden(self, name: str, spill: str | os.PathLike[str] | None) -> HiddenStates:
        if self.keep is None:
            return HiddenStates(None)
        return KeptHiddenStates(self.keep / (name or "model"), str(self.ranks.rank))

    def rest(self) -> None:
        """Write every unit that nothing was done to."""
        for unit in self.model.units:
            if unit in self.done:
                continue
            if unit not in self.model.held:
                self.model.load(unit)
            self.commit(unit)
            if unit in self.model.blocks:
                self.model.free(unit)
        sync_folder(self.work)

    def same(self, asked: Mapping[str, Any]) -> None:
        """Raise unless the folder was begun with the same request."""
        before = self.journal.read()[0]
        if odd := [k for k in asked if json.loads(json.dumps(asked[k])) != before.get(k)]:
            raise InvalidArgument(
                f"{self.work}: was begun with {odd[0]}={before.get(odd[0])!r}, not "
                f"{asked[odd[0]]!r}; go on with the same options and data, or start anew"
            )
        self.shards.check()


def refuse_missing(work: Path) -> None:
    """Raise where there is nothing to go on with."""
    if not (work / "journal.jsonl").is_file():
        raise CheckpointError(f"{work}: nothing was begun there, so nothing can be resumed")
