"""What damage, kills and random cases come to: the figures that the page of the docs shows.

    python benchmarks/reliability.py [--damage 400] [--writes 60] [--kills 12] [--cases 2000]
                                     [--seed 0] [--out benchmarks/results/reliability.json]

Damaged files (`damage.py`), writes and commands that are killed (`sudden.py`), random cases against
their reference (`fuzz.py`); the formats are in `written.py`. Seeds fix every trial but for where a
kill by time finds a process. The exit code is 1 where anything came out that must not.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are forked: no threads before
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import damage
import fuzz
import sudden
from sparseworks.diagnostics.machines import machine
from written import FORMATS, OTHERS


def faults(result: dict[str, Any]) -> int:
    """How many of all trials came out as they must not."""
    return (
        sum(r[k] for r in result["damage"] for k in damage.BAD)
        + sum(r[k] for r in result["writes"] for k in ("neither", "left over"))
        + sum(r["ended with other files"] for r in result["commands"])
        + sum(r[k] for r in result["fuzz"] for k in ("differs", "error", "crash"))
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--damage", type=int, default=400, help="of each format")
    parser.add_argument("--writes", type=int, default=60, help="of each format")
    parser.add_argument("--kills", type=int, default=12, help="of each command")
    parser.add_argument("--cases", type=int, default=2000, help="of each law")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import transformers.models.llama.modeling_llama  # noqa: F401  (before the forks)

    import sparseworks.weights.oneshot.from_disk  # noqa: F401

    began = time.monotonic()
    seed, sets = given.seed, fuzz.instruction_sets()

    def told(rows: Any) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            print(json.dumps(row), flush=True)
            found.append(row)
        return found

    result: dict[str, Any] = {
        "seed": seed, "machine": machine(), "instruction sets": sets,
        "fuzz": told(fuzz.campaign(n, given.cases, seed, sets) for n in fuzz.LAWS),
        "damage": told(damage.campaign(n, f, given.damage, seed) for n, f in FORMATS.items()),
        "damage of exports": told(
            damage.campaign(n, f, given.damage, seed) for n, f in OTHERS.items()
        ),
        "writes": told(
            sudden.writes(n, f, given.writes, seed) for n, f in {**FORMATS, **OTHERS}.items()
        ),
        "commands": told(sudden.commands(n, given.kills, seed) for n in sudden.COMMANDS),
    }  # fmt: skip
    result |= {"must not be": faults(result), "minutes": round((time.monotonic() - began) / 60, 1)}
    print(json.dumps({k: result[k] for k in ("must not be", "minutes")}))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["must not be"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
