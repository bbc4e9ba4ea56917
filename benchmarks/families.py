"""Prune, save, reload, slim and compile a small model of each of many families.

    python benchmarks/families.py [--only NAME ...] [--parts out/families]
                                  [--out benchmarks/results/families.json]

Random weights, half of them zeroed by magnitude and by Wanda, a file and a Hugging Face folder
written and read, 30 % of the operations cut, the sparse model compiled. Each step is *ok*,
*refused* (by an error of ours that says why), *failed* (anything else: another exception, or a law
below that does not hold) or *not reached*.

- magnitude: half of the weights are zero; no zeroed one was larger than one kept in its tensor; the
  kept are unchanged.
- wanda: half of the weights are zero; the kept are unchanged.
- file, folder: every bit of the state, the masks, and the outputs of the model that is read back.
- slim: the outputs of the cut model are those of the whole one with the cut groups zeroed, on an
  example and on other inputs; parameters and operations (torch's own counter) fell; the model that
  is read back from disk computes the same.
- compile: the outputs of the sparse model, on the example and on other inputs; where torch is
  faster at this size, the program is tried all the same.

A family has a process of its own; finished ones are kept in `--parts` until all are done, so that a
run that was stopped goes on. The list was fixed before the first run; none is left out for its
result. Needs timm and transformers.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparseworks as sw
from model_families import FAMILIES, Family
from sparseworks.core.errors import SparseworksError
from sparseworks.diagnostics.machines import machine
from sparseworks.engine.graph import capture
from sparseworks.engine.measuring import difference, tensors_of
from sparseworks.engine.plan import make_plan
from sparseworks.weights.structured import load_slim, save_slim
from sparseworks.weights.structured.checking import check
from sparseworks.weights.structured.cutting import zero

SPARSITY, SHARE = 0.5, 0.7
SLIM_TOLERANCE, PROGRAM_TOLERANCE = 2e-3, 1e-3
SECONDS = 900  # of one family; more is a failure
STEPS = ("magnitude", "wanda", "file", "folder", "slim", "compile")
Note = dict[str, Any]


class Broken(Exception):
    """A law that does not hold."""


def require(law: bool, what: str) -> None:
    if not law:
        raise Broken(what)


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def outputs(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    found = tensors_of(model(**given))
    require(bool(found), "the model returns no tensor")
    return found


def same_bits(name: str, expected: list[Tensor], found: list[Tensor]) -> None:
    require(len(expected) == len(found), f"{name}: another number of tensors")
    for a, b in zip(expected, found):
        require(a.shape == b.shape and torch.equal(raw(a), raw(b)), f"{name}: other bits")


class Steps:
    """The steps of one family, and what they hand on."""

    def __init__(self, name: str, family: Family, work: Path) -> None:
        self.name, self.family, self.work = name, family, work
        self.example, self.other = family.inputs(2, 1), family.inputs(3, 9)
        self.sparse: nn.Module | None = None

    def pruned(self, method: str, **more: Any) -> tuple[nn.Module, nn.Module, Note]:
        """(before, after, what was done); the laws of every method."""
        before = self.family.make()
        done = sw.prune(before, method, sparsity=SPARSITY, copy=True, **more)
        model: nn.Module = done.model
        masks = sw.masks(model)
        require(masks is not None and len(masks) > 0, "no masks")
        old, new = dict(before.named_parameters()), dict(model.named_parameters())
        zeros = weights = 0
        for name in masks:
            kept, was, now = masks[name], old[name].detach(), new[name].detach()
            require(torch.equal(now[kept], was[kept]), f"{name}: a kept weight changed")
            require(not bool(now[~kept].any()), f"{name}: a masked weight is not 0")
            zeros, weights = zeros + int((~kept).sum()), weights + kept.numel()
        require(abs(zeros / weights - SPARSITY) < 0.01, f"{zeros / weights:.3f} are zero")
        for name in old.keys() - set(masks):
            require(
                torch.equal(raw(old[name]), raw(new[name])), f"{name}: has no mask, but changed"
            )
        return before, model, {"tensors": len(masks), "weights": weights}

    def magnitude(self) -> Note:
        before, model, note = self.pruned("magnitude")
        masks = sw.masks(model)
        for name, was in before.named_parameters():
            if name in masks:
                size, kept = was.detach().abs(), masks[name]
                law = float(size[~kept].max()) <= float(size[kept].min())
                require(law, f"{name}: a zeroed weight was larger than a kept one")
        return note

    def wanda(self) -> Note:
        data = [self.family.inputs(4, seed) for seed in (3, 4)]
        _, self.sparse, note = self.pruned("wanda", data=data)
        return note

    def _reread(self, found: nn.Module) -> None:
        expected = self._sparse()
        a, b = expected.state_dict(), found.state_dict()
        require(a.keys() == b.keys(), "other names")
        same_bits("the state", list(a.values()), [b[n] for n in a])
        record, again = sw.masks(expected), sw.masks(found)
        require(again is not None and set(record) == set(again), "other masks")
        require(all(torch.equal(record[n], again[n]) for n in record), "other masks")
        wanted = outputs(expected, self.example)
        same_bits("the outputs", wanted, outputs(found.eval(), self.example))

    def _sparse(self) -> nn.Module:
        require(self.sparse is not None, "no sparse model")
        return self.sparse  # type: ignore[return-value]

    def file(self) -> Note:
        path = self.work / "model.safetensors"
        sw.save(self._sparse(), path)
        self._reread(sw.load(path, self.family.make(seed=1)))
        dense = sum(t.numel() * t.itemsize for t in self._sparse().state_dict().values())
        return {"bytes": path.stat().st_size, "of dense": path.stat().st_size / dense}

    def folder(self) -> Note:
        if self.name.startswith("timm"):
            return {"status": "does not apply"}
        sw.save(self._sparse(), self.work / "folder")
        found = sw.from_pretrained(self.work / "folder")
        require(type(found) is type(self.sparse), f"read as a {type(found).__name__}")
        self._reread(found)
        return {}

    def slim(self) -> Note:
        try:
            return self._slim({})
        except SparseworksError as error:
            if not hasattr(self.family.make(), "config"):
                raise
            reason = str(error)
        return {**self._slim({"uniform": False}), "uniform": reason}

    def _slim(self, options: Note) -> Note:
        model, zeroed = self.family.make(), []

        def seen(model: nn.Module, example: Any, coupling: Any, keep: Any) -> None:
            twin = copy.deepcopy(model)
            zero(twin, coupling, keep)
            zeroed.append(twin)
            check(model, example, coupling, keep)

        with patch("sparseworks.weights.structured.applying.check", seen):
            done = sw.slim(model, self.example, flops=SHARE, copy=True, **options)
        require(len(zeroed) == 1, "not checked against the zeroed model")
        worst = 0.0
        for given in (self.example, self.other):
            wanted, found = outputs(zeroed[0], given), outputs(done.model, given)
            alike = [(a, b) for a, b in zip(wanted, found, strict=True) if a.shape == b.shape]
            require(bool(alike), "all outputs have other shapes")
            worst = max(worst, *(difference([a], [b]) for a, b in alike))
        require(worst <= SLIM_TOLERANCE, f"differs from the zeroed model by {worst:.1e}")
        counts = [sum(p.numel() for p in m.parameters()) for m in (model, done.model)]
        flops = [counted(m, self.example) for m in (model, done.model)]
        require(counts[1] < counts[0] and flops[1] < flops[0], "neither smaller nor faster")
        save_slim(done, self.work / "slim")
        again = load_slim(self.work / "slim", self.family.make(seed=1))
        wanted = outputs(done.model, self.example)
        same_bits("the slimmed model from disk", wanted, outputs(again, self.example))
        return {"difference": worst, "parameters": counts[1] / counts[0],
                "operations": flops[1] / flops[0]}  # fmt: skip

    def compile(self) -> Note:
        model = self._sparse()
        if getattr(getattr(model, "config", None), "use_cache", False):
            model.config.use_cache = False  # as compiled models are
        fast = sw.compile(model, self.example)
        note: Note = {"kind": fast.kind, "difference": self._compared(model, fast)}
        missing = [n for n in fast.notes if n.startswith("no program")]
        if missing:
            note["no program"] = missing[0]
        elif fast.kind != "program":
            plan = make_plan(capture(model, (), self.example), torch.get_num_threads())
            require(plan is not None, "no plan, and no reason")
            note["program"] = self._compared(model, plan)
        return note

    def _compared(self, model: nn.Module, run: Callable[..., Any]) -> float:
        worst = 0.0
        for given in (self.example, self.other):
            wanted, found = outputs(model, given), tensors_of(run(**given))
            require(len(wanted) == len(found), "another number of outputs")
            worst = max(worst, difference(wanted, found))
        require(worst <= PROGRAM_TOLERANCE, f"differs from the model by {worst:.1e}")
        return worst


def grouped(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Operations of the products of a mixture, which torch's counter does not know."""
    return 2 * int(torch.Size(out_shape).numel()) * int(a[-1])


def counted(model: nn.Module, given: dict[str, Tensor]) -> int:
    """Operations by torch's own counter."""
    banks = {torch.ops.aten._grouped_mm: grouped}
    with FlopCounterMode(display=False, custom_mapping=banks) as counter, torch.no_grad():
        model(**given)
    return int(counter.get_total_flops())


def tried(step: Callable[[], Note]) -> Note:
    """What a step says, or how it ended."""
    began = time.perf_counter()
    try:
        found = {"status": "ok", **step()}
    except SparseworksError as error:
        found = {"status": "refused", "message": str(error)[:400]}
    except Exception as error:
        found = {"status": "failed", "message": f"{type(error).__name__}: {error}"[:400]}
    return {**found, "seconds": round(time.perf_counter() - began, 2)}


def row(name: str) -> Note:
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory(prefix="families-") as work:
        steps = Steps(name, family, Path(work))
        size = sum(p.numel() for p in family.make().parameters())
        found: Note = {"family": name, "kind": family.kind, "parameters": size}
        for step in STEPS:
            if step in ("file", "folder", "compile") and steps.sparse is None:
                found[step] = {"status": "not reached"}
            else:
                found[step] = tried(getattr(steps, step))
    return found


def in_a_process(name: str, seconds: float = SECONDS) -> Note:
    """The row of a family; a process that dies is a failure of its steps, not of the run."""
    words = [sys.executable, __file__, "--one", name]
    try:
        run = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
        lines = run.stdout.strip().splitlines()
        if run.returncode == 0 and lines:
            found: Note = json.loads(lines[-1])
            return found
        last = (run.stderr.strip().splitlines() or [""])[-1]
        message = f"the process ended with {run.returncode}: {last[:300]}"
    except subprocess.TimeoutExpired:
        message = f"did not end within {seconds:.0f} s"
    failed = {step: {"status": "failed", "message": message} for step in STEPS}
    return {"family": name, "kind": FAMILIES[name].kind, "parameters": 0, **failed}


def summary(rows: list[Note]) -> Note:
    return {step: dict(Counter(r[step]["status"] for r in rows)) for step in STEPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES), metavar="NAME")
    parser.add_argument("--parts", type=Path, default=Path("out/families"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=list(FAMILIES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        torch.set_num_threads(1)
        print(json.dumps(row(given.one)))
        return
    given.parts.mkdir(parents=True, exist_ok=True)
    rows, began = [], time.monotonic()
    for name in given.only or FAMILIES:
        part = given.parts / f"{name}.json"
        if not part.is_file():
            found = in_a_process(name)
            part.with_suffix(".part").write_text(json.dumps(found))
            part.with_suffix(".part").replace(part)
        rows.append(json.loads(part.read_text()))
        print(name, *(f"{s}: {rows[-1][s]['status']}" for s in STEPS), sep="  ", flush=True)
    used = {"timm": version("timm"), "transformers": version("transformers")}
    result = {
        "machine": machine() | used,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "families": len(rows),
        "summary": summary(rows),
        "rows": rows,
    }
    print(json.dumps(result["summary"], indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    if not given.only:
        shutil.rmtree(given.parts)


if __name__ == "__main__":
    main()
