"""Prune, save, reload, slim and compile a small model of each of many families.

    python benchmarks/every_family.py [--only NAME ...] [--parts out/families]
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

A family has a process of its own, forked from one that has the libraries loaded; finished ones are
kept in `--parts` until all are done, so that a run that was stopped goes on. The list was fixed
before the first results; none is left out for its own. Needs timm and transformers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import select
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are forked: no threads before
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from family_steps import Note, Steps
from forking import forked
from model_families import FAMILIES
from sparseworks.core.errors import SparseworksError
from sparseworks.diagnostics.machines import machine

STEPS = ("magnitude", "wanda", "file", "folder", "slim", "compile")
SECONDS = 900  # of one family; more is a failure


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
    """The row of a family, from a fork of this process; one that dies is a failure of its steps,
    not of the run."""
    reading, writing = os.pipe()

    def tell() -> None:
        with os.fdopen(writing, "w") as told:
            told.write(json.dumps(row(name)))

    child = forked(tell)
    os.close(writing)
    text, end = b"", time.monotonic() + seconds
    while select.select([reading], [], [], max(0.0, end - time.monotonic()))[0]:
        piece = os.read(reading, 1 << 16)
        if not piece:
            break
        text += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    if text and not status:
        found: Note = json.loads(text)
        return found
    late = time.monotonic() >= end
    message = f"did not end within {seconds:.0f} s" if late else f"the process ended with {status}"
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
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(row(given.one), indent=1))
        return
    for library in ("timm", "torch._dynamo", "transformers.models.llama.modeling_llama"):
        importlib.import_module(library)  # before the forks
    given.parts.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in given.only or FAMILIES:
        part = given.parts / f"{name}.json"
        if not part.is_file():
            found = in_a_process(name)
            part.with_suffix(".part").write_text(json.dumps(found))
            part.with_suffix(".part").replace(part)
        # where packages lie on this machine is nobody's concern
        rows.append(json.loads(re.sub(r"/[^ \"']*site-packages/", "", part.read_text())))
        print(name, *(f"{s}: {rows[-1][s]['status']}" for s in STEPS), sep="  ", flush=True)
    used = {"timm": version("timm"), "transformers": version("transformers")}
    result = {
        "machine": machine() | used,
        "minutes": round(sum(r[s].get("seconds", 0) for r in rows for s in STEPS) / 60, 1),
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
