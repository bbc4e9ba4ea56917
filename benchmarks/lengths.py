"""A compiled encoder of MiniLM's shape as a service meets it: every text of another length.

    python benchmarks/lengths.py [--calls 1000] [--out benchmarks/results/lengths.json]

Random weights, 90 % zeros, batches of 1 to 8 texts of 3 to 512 tokens, drawn uniformly. Every call
is timed where it comes, by a model that has met nothing but the calls before; right behind it
another copy runs the same size twice, whose second time is what the size takes alone, and now
and then torch does. Memory is that of a fresh process which loads the plan and does nothing else:
with glibc's allocator as it is, which keeps freed blocks of up to 32 MB, and where it gives back
those of 1 MiB and more (MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseworks as sw
from sparseworks.diagnostics.claims import machine

WORDS, SEED, LARGEST = 30522, 12, (8, 512)


def model() -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(SEED)
    made = BertModel(
        BertConfig(
            vocab_size=WORDS, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
            intermediate_size=1536,
        )
    )  # fmt: skip
    sw.prune(made.eval(), "magnitude", sparsity=0.9)
    return made


def sizes(count: int) -> list[tuple[int, int]]:
    draw = random.Random(SEED)
    return [(draw.randint(1, 8), draw.randint(3, 512)) for _ in range(count)]


def texts(batch: int, length: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1000 * batch + length)
    kept = torch.randint(1, length + 1, (batch, 1), generator=g)
    kept[0] = length
    return {
        "input_ids": torch.randint(0, WORDS, (batch, length), generator=g),
        "attention_mask": (torch.arange(length) < kept).long(),
    }


def milliseconds(run: Callable[..., Any], given: dict[str, Tensor]) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        run(**given)
    return (time.perf_counter() - start) * 1e3


def median_ms(run: Callable[..., Any], given: dict[str, Tensor], repeat: int) -> float:
    milliseconds(run, given)
    return statistics.median(milliseconds(run, given) for _ in range(repeat))


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def times(plan: Path, dense: torch.nn.Module, calls: int, every: int) -> dict[str, Any]:
    """Every size where it comes, alone, and every n-th in torch."""
    met, alone = sw.load_compiled(plan), sw.load_compiled(plan)
    drawn = sizes(calls)
    first = milliseconds(met, texts(*drawn[0]))
    for fast in (met, alone):
        fast(**texts(*drawn[0]))
    come, by_itself, against = [], [], []
    for i, size in enumerate(drawn):
        given = texts(*size)
        come.append(milliseconds(met, given))
        by_itself.append(median_ms(alone, given, 1))
        if i % every == 0:
            against.append((come[-1], median_ms(dense, given, 3)))
    more = [a - b for a, b in zip(come, by_itself, strict=True)]
    return {
        "first call after loading, ms": first,
        "mean ms": statistics.mean(come),
        "mean ms of the same sizes alone": statistics.mean(by_itself),
        "mean over mean alone": statistics.mean(come) / statistics.mean(by_itself),
        "median ms more than alone": statistics.median(more),
        "p99 ms": quantile(come, 0.99),
        "p99 ms alone": quantile(by_itself, 0.99),
        "calls timed in torch too": len(against),
        "mean ms of those": statistics.mean(ours for ours, _ in against),
        "mean ms of those in torch": statistics.mean(theirs for _, theirs in against),
        "p99 of time over torch's median of the size": quantile([a / b for a, b in against], 0.99),
    }


def memory(plan: Path, calls: int) -> dict[str, float]:
    """In MB, of a process of its own: resident before and after the largest size, and after all."""
    fast = sw.load_compiled(plan)
    fast(**texts(1, 80))
    rows = {
        "packed weights": sum(p.shared.bytes for p in fast.plan.parts) / 1e6,
        "resident": resident_mb(),
    }
    fast(**texts(*LARGEST))
    rows["resident after 8 x 512"] = resident_mb()
    for size in sizes(calls):
        fast(**texts(*size))
    rows["resident after all"] = resident_mb()
    rows["kept for sizes"] = (fast.plan.recent.bytes + fast.plan.of_sizes.bytes) / 1e6
    rows["working memory"] = fast.plan.parts[0].shared.arena.bytes / 1e6
    rows["grown since 8 x 512, over packed weights"] = (
        rows["resident after all"] - rows["resident after 8 x 512"]
    ) / rows["packed weights"]
    rows["grown since 1 x 80, over packed weights"] = (
        rows["resident after all"] - rows["resident"]
    ) / rows["packed weights"]
    return rows


def threads(plan: Path, dense: torch.nn.Module, calls: int) -> float:
    """Largest relative error of four threads that call at once, each with sizes of its own."""
    fast = sw.load_compiled(plan)
    with torch.no_grad():
        wanted = {s: dense(**texts(*s)).last_hidden_state for s in set(sizes(calls))}

    def error(size: tuple[int, int]) -> float:
        found = fast(**texts(*size)).last_hidden_state
        return float((found - wanted[size]).abs().max() / wanted[size].abs().max())

    def errors(seed: int) -> float:
        drawn = sizes(calls)
        random.Random(seed).shuffle(drawn)
        return max(map(error, drawn))

    with ThreadPoolExecutor(4) as pool:
        return max(pool.map(errors, range(4)))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--every", type=int, default=5, help="of so many calls one runs in torch")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        print(json.dumps(memory(given.memory, given.calls)))
        return
    dense = model()
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "model.plan"
        sw.compile(dense, texts(1, 80)).save(plan)
        command = [sys.executable, __file__, "--memory", str(plan), "--calls", str(given.calls)]

        def held(**settings: str) -> dict[str, float]:
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env=os.environ | settings
            )
            return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]

        rows = {
            "machine": machine() | {"transformers": version("transformers")},
            "calls": given.calls,
            "memory MB": held(),
            "memory MB, large blocks given back": held(MALLOC_MMAP_THRESHOLD_="1048576"),
            "times": times(plan, dense, given.calls, given.every),
            "relative error of four threads": threads(plan, dense, min(given.calls, 12)),
        }
    print(json.dumps(rows, indent=1))
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
