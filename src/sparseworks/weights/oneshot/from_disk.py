"""`sparseworks.prune_folder`: prune a model that is larger than memory, from disk to disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseworks.core import registry
from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import attach
from sparseworks.core.patterns import Pattern, parse_pattern, resolve_sparsity
from sparseworks.core.types import Progress, PruneResult
from sparseworks.io.atomic import sync_folder
from sparseworks.io.blockwise import BlockwiseModel
from sparseworks.io.container import as_bytes
from sparseworks.io.folders import save_folder, write_side_files
from sparseworks.io.shards import Shards, parse_size
from sparseworks.models.calibration import Calibration
from sparseworks.models.calls import Arguments, Batch
from sparseworks.models.ranks import Ranks
from sparseworks.models.views import find_prunable
from sparseworks.weights.oneshot.base import OneShot
from sparseworks.weights.oneshot.footprint import Footprint, footprint
from sparseworks.weights.oneshot.job import Job
from sparseworks.weights.oneshot.jobs import LazyScores
from sparseworks.weights.oneshot.prune import allotment, batches_of, budget_name, fitting
from sparseworks.weights.oneshot.recovery import Recovery, get_recovery, name_of
from sparseworks.weights.oneshot.sensitivity import Sensitivity
from sparseworks.weights.oneshot.staging import Staging, refuse_missing

__all__ = ["prune_folder"]


def _no_scores() -> dict[str, Tensor]:
    raise InvalidArgument(
        "this budget compares the scores of all weights, of which a model on disk has one block "
        "at a time: use 'uniform', 'erk' or sparsities per tensor"
    )


@torch.no_grad()
def prune_folder(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str | OneShot,
    *,
    sparsity: float | None = None,
    pattern: str | Pattern | None = None,
    budget: str | Mapping[str, float] | Budget | None = None,
    data: Iterable[Batch] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    skip_indivisible: bool = False,
    recovery: str | Recovery | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    layout: str = "dense",
    shard_size: str | int = "5GB",
    spill: bool = False,
    resume: bool = False,
    group: Any = None,
    announce: Callable[[Footprint], None] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult:
    """Prune the model in a folder one block at a time; the result is that of `prune`, bit for bit.

    Memory holds one block with its evidence, and the inputs of one block for all batches (on disk
    with `spill`). Finished blocks are written into `<out>.part`, which becomes `out` in the end. A
    call that was killed goes on with `resume`: no block is done twice, and the result is the same.

    Args:
        folder: config.json and dense safetensors, one file or shards.
        out: folder that is made; it must not exist.
        method: one-shot, of those that look at one weight at a time.
        sparsity, pattern, budget, include, exclude, skip_indivisible, recovery, seed, device,
            progress, options: as in `prune`; no budget that compares the weights of all blocks.
        data: calibration batches.
        dtype: convert the weights as they are read; None: as config.json says.
        layout: "dense", shards with an index as transformers writes them and the masks beside them
            (masks/), or "packed", as `save` writes.
        shard_size: of the largest shard.
        spill: keep the hidden states between blocks on disk instead of in memory; `resume` then
            computes nothing again. Without, it passes the data through the finished blocks.
        resume: go on in `<out>.part`.
        group: of torch.distributed, whose ranks share the batches and a file system; rank 0 writes.
        announce: told before the start how much memory it will take.

    Returns:
        What was done per tensor; its `model` is the path of the folder.

    Raises:
        InvalidArgument: an option cannot be used; nothing was written.
        CheckpointError: not such a folder, or no space on the disk.
        ModelError, DataError: weights or evidence that are not finite; what is done stays done.
    """
    began = time.perf_counter()
    folder, out = Path(folder), Path(out).absolute()
    chosen = _one_at_a_time(registry.build(method, ("one-shot", "search", "staged"), **options))
    legal = parse_pattern(chosen.pattern if pattern is None else pattern)
    wanted = resolve_sparsity(legal, sparsity)
    repair = get_recovery(recovery)
    if repair is not None:
        repair.check(legal)
    allot = allotment(chosen, budget, legal, False)
    if isinstance(allot, Sensitivity):
        raise InvalidArgument(
            f"budget '{allot}' measures the whole model; give its sparsities per tensor"
        )
    if layout not in ("dense", "packed"):
        raise InvalidArgument(f"layout={layout!r}: 'dense' or 'packed'")
    largest = parse_size(shard_size)
    batches = batches_of(chosen, data, repair, allot)
    work = out.with_name(out.name + ".part")
    if out.exists():
        raise InvalidArgument(f"{out}: already exists; choose another folder")
    if not out.parent.is_dir():
        raise InvalidArgument(f"{out.parent}: no such folder, so {out.name} cannot be made in it")
    if resume:
        refuse_missing(work)
    elif work.exists():
        raise InvalidArgument(f"{work}: a call was interrupted there; go on with resume, or delete")
    blockwise = BlockwiseModel(folder, dtype)
    model = blockwise.model
    found = find_prunable(model, include, exclude, weightless=True)
    views, skipped = fitting(found.views, legal, skip_indivisible)
    skipped = found.reasons() | skipped
    ranks = Ranks(group)
    needed = footprint(blockwise, views, chosen, repair, batches, spill, ranks.size)
    if announce is not None:
        announce(needed)
    original = layout == "dense"
    parameters = sum(p.numel() for p in model.parameters())
    shards = Shards(work, blockwise.layout(original), largest, parameters)
    settings = {
        **registry.options_of(chosen),
        "sparsity": wanted,
        "pattern": str(legal),
        "budget": budget_name(budget, chosen, legal),
        "rounds": 1,
        "recovery": name_of(recovery),
        "seed": seed,
    }
    asked = {
        "method": chosen.info.name,
        **{k: v if isinstance(v, (int, float, str, type(None))) else str(v)
           for k, v in settings.items()},
        "model": _files(folder),
        "weights": hashlib.sha256("\n".join(v.name for v in views).encode()).hexdigest(),
        "data": _digest(batches),
        "dtype": str(blockwise.dtype),
        "layout": layout,
    }  # fmt: skip
    allot([v.spec(legal) for v in views], wanted, LazyScores(_no_scores))  # or it is refused
    ranks.wait()  # all have seen that the folder is not there
    if ranks.rank == 0 and not resume:
        work.mkdir()
        try:
            shards.create()
            Staging(blockwise, shards, work, original, ranks, None).journal.begin(asked)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    ranks.wait()
    staging = Staging(blockwise, shards, work, original, ranks, work / "hidden" if spill else None)
    staging.same(asked)
    job = Job(model, chosen, legal, allot, batches, None, repair, seed, False)
    job.budget, job.home, job.ranks = allot, staging, ranks
    if batches is not None:
        job.calibration = Calibration(
            batches, device, chosen.propagate, None, progress, ranks, staging
        )
    staging.restore(job, views)
    ranks.wait()  # all have read the journal before it grows
    with staging.lent():
        job.round(views, wanted, skipped, progress)
    staging.rest()
    if ranks.rank == 0:
        attach(model, job.record)
        _finish(staging, out)
    ranks.wait()
    attach(model, None)
    return PruneResult(
        chosen.info.name,
        {**settings, "memory": needed.total},
        tuple(job.results[v.name] for v in views if v.name in job.results),
        skipped,
        job.record,
        out,
        job.shortfall,
        time.perf_counter() - began,
        tuple(job.warnings),
    )


def _one_at_a_time(method: Any) -> OneShot:
    """The method, where it needs one weight with the evidence of its inputs at a time."""
    whole = not isinstance(method, OneShot)
    if not whole:
        kind = type(method)
        gradients = kind.gather is not OneShot.gather and method.collector is None
        whole = gradients or kind.prepare is not OneShot.prepare or kind.rounds != 1
    if whole:
        raise InvalidArgument(
            f"{method.info.name} looks at the whole model at once, of which a model on disk has "
            "one block at a time: load it and use sparseworks.prune"
        )
    assert isinstance(method, OneShot)
    return method


def _files(folder: Path) -> list[list[Any]]:
    """What tells that the model is still the same."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _digest(batches: Any) -> str | None:
    if batches is None:
        return None
    digest = hashlib.sha256()
    for batch in batches:
        for value in Arguments.of_batch(batch).values:
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype}{list(value.shape)}".encode())
                digest.update(as_bytes(value.detach().cpu().contiguous()))
    return digest.hexdigest()


def _finish(staging: Staging, out: Path) -> None:
    """The folder as its readers expect it, under its name."""
    work, blockwise = staging.work, staging.model
    if staging.original:
        staging.shards.write_index()
        write_side_files(blockwise.model, work)
        shutil.rmtree(work / "hidden", ignore_errors=True)
        (work / "journal.jsonl").unlink()
        os.rename(work, out)
        sync_folder(out.parent)
        return
    for unit in blockwise.blocks:
        blockwise.load(unit, staging.staged, mapped=True)
    save_folder(blockwise.model, out)
    shutil.rmtree(work)
