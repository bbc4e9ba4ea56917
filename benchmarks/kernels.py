"""Time the sparse products against torch: medians over interleaved calls, as JSON.

Each part is one kind of kernel; `--parts` chooses some, and their rows replace those of an earlier
run in the same file. In each round a kernel is called six times and the last three are timed, as a
caller in a loop sees it: the threads of the other library have gone to sleep, one's own are awake.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparseworks.engine.products import SparseLinear
from sparseworks.kernels import (
    block_product,
    gathered,
    instruction_set,
    nm_product,
    pack_blocks,
    pack_columns,
    pack_index,
    pack_integer,
    pack_mask,
    pack_nm,
    spmv,
)

Row = dict[str, object]
Call = Callable[[], object]


def times(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Quartiles in milliseconds of each call; every call runs in every round."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            for again in range(6):
                begin = time.perf_counter()
                call()
                if turn and again >= 3:
                    seen[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.quantiles(values, n=4) for name, values in seen.items()}


def compared(case: str, calls: dict[str, Call], repeats: int, **about: object) -> Iterator[Row]:
    """A row for each call but the first, which is the peer of all."""
    found = times(calls, repeats)
    peer, *ours = found
    for name in ours:
        low, median, high = found[name]
        yield {
            "case": case,
            "kernel": name,
            **about,
            "ms": round(median, 4),
            "quartiles": [round(low, 4), round(high, 4)],
            "peer": peer,
            "peer_ms": round(found[peer][1], 4),
            "ratio": round(found[peer][1] / median, 2),
        }


def decoding(repeats: int, threads: int) -> Iterator[Row]:
    """y = W x, one vector, unstructured."""
    weight, noise, x = torch.randn(4096, 4096), torch.rand(4096, 4096), torch.randn(4096)
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        kept = weight * (noise >= sparsity)
        masked, integer, indexed = pack_mask(kept), pack_integer(kept), pack_index(kept)
        calls: dict[str, Call] = {
            "torch fp32 dense": lambda: linear(x, weight),
            "bits, bf16": lambda p=masked: spmv(p, x, threads=threads),
            "bits, int8": lambda p=integer: spmv(p, x, threads=threads),
            "indices, bf16": lambda p=indexed: spmv(p, x, threads=threads),
        }
        yield from compared("4096 x 4096, batch 1", calls, 3 * repeats, sparsity=sparsity)


def batched(repeats: int, threads: int) -> Iterator[Row]:
    """Y = W X, unstructured, fp32; and Y = X W^T, which has to be transposed on both sides."""
    weight, noise, right = torch.randn(4096, 4096), torch.rand(4096, 4096), torch.randn(4096, 256)
    x = right.t().contiguous()
    for sparsity in (0.8, 0.9, 0.95):
        kept = weight * (noise >= sparsity)
        layer, csr = SparseLinear(kept, None, threads), kept.to_sparse_csr()
        calls: dict[str, Call] = {
            "torch CSR": lambda c=csr: c @ right,
            "taps, fp32": lambda f=layer: f.columns(right),
            "taps, fp32, X W^T": lambda f=layer: f(x),
        }
        for row in compared("4096 x 4096, batch 256", calls, repeats, sparsity=sparsity):
            yield {**row, "useful_gflops": rate(2 * layer.kept * 256, row)}


def columns(repeats: int, threads: int) -> Iterator[Row]:
    """y = W[:, index] x[index]."""
    for rows, wide in ((4096, 4096), (11008, 4096)):
        weight, x = torch.randn(rows, wide), torch.randn(wide)
        single, half = pack_columns(weight), pack_columns(weight.bfloat16())
        for live in (0.1, 0.25, 0.5):
            # another index each time, so that what was read last time is of no use
            index = itertools.cycle(
                [torch.randperm(wide)[: int(live * wide)].sort().values for _ in range(7)]
            )
            calls: dict[str, Call] = {
                "torch fp32 dense": lambda w=weight, x=x: linear(x, w),
                "columns, fp32": lambda p=single, x=x, i=index: gathered(
                    p, x, next(i), None, threads
                ),
                "columns, bf16": lambda p=half, x=x, i=index: gathered(
                    p, x, next(i), None, threads
                ),
            }
            yield from compared(f"{rows} x {wide}, batch 1", calls, 2 * repeats, live=live)


def blocks(repeats: int, threads: int) -> Iterator[Row]:
    """Y = X W^T, blocks, bf16; "dense" keeps all of them."""
    for rows, wide, tokens in ((4096, 4096, 256), (1536, 384, 2048), (384, 1536, 2048)):
        weight, x = torch.randn(rows, wide).bfloat16(), torch.randn(tokens, wide).bfloat16()
        calls: dict[str, Call] = {"torch bf16 dense": lambda w=weight, x=x: linear(x, w)}
        for block in ((16, 32), (32, 32), (64, 64)):
            for sparsity in (0.0, 0.5, 0.75, 0.9) if block == (16, 32) else (0.75,):
                grid = torch.rand(rows // block[0], wide // block[1]) >= sparsity
                mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
                packed = pack_blocks(weight, mask, block)
                name = f"{block[0]} x {block[1]}, {sparsity:.0%} zero" if sparsity else "dense"
                calls[name] = lambda p=packed, x=x: block_product(p, x, threads=threads)
        case = f"{rows} x {wide}, batch {tokens}"
        for row in compared(case, calls, repeats):
            yield {**row, "dense_gflops": rate(2 * rows * wide * tokens, row)}


def patterns(repeats: int, threads: int) -> Iterator[Row]:
    """Y = X W^T, N:M; in fp32 and batches beside the taps of `compile`, which know no pattern."""
    shapes = ((4096, 4096, 1), (4096, 4096, 256), (1536, 384, 2048))
    for rows, wide, tokens in shapes:
        weight, x = torch.randn(rows, wide), torch.randn(tokens, wide)
        for dtype in (torch.float32, torch.bfloat16):
            name = "fp32" if dtype == torch.float32 else "bf16"
            dense, given = weight.to(dtype), x.to(dtype)
            calls: dict[str, Call] = {f"torch {name} dense": lambda w=dense, x=given: linear(x, w)}
            for n, m in ((2, 4), (1, 4), (2, 8)):
                mask = chosen(weight, n, m)
                packed = pack_nm(dense, mask, (n, m), dtype)
                calls[f"{n}:{m} {name}"] = lambda p=packed, x=given: nm_product(
                    p, x, threads=threads
                )
                if dtype == torch.float32 and tokens > 1:
                    layer = SparseLinear(weight * mask, None, threads)
                    calls[f"{n}:{m} fp32, taps"] = lambda f=layer, x=given: f(x)
            case = f"{rows} x {wide}, batch {tokens}"
            for row in compared(case, calls, repeats * (3 if tokens == 1 else 1)):
                yield {**row, "dense_gflops": rate(2 * rows * wide * tokens, row)}


def chosen(weight: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m neighbours."""
    score = weight.abs().view(weight.shape[0], -1, m)
    mask = torch.zeros(score.shape, dtype=torch.bool)
    return mask.scatter_(2, score.topk(n, 2).indices, True).view(weight.shape)


def rate(operations: int, row: Row) -> float:
    return round(operations / (float(str(row["ms"])) * 1e6), 1)


def processor() -> str:
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


PARTS = {f.__name__: f for f in (decoding, batched, columns, blocks, patterns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    results: dict[str, object] = {}
    if given.out is not None and given.out.exists():
        results = json.loads(given.out.read_text()).get("parts", {})
    for part in given.parts:
        rows = []
        for row in PARTS[part](given.repeats, given.threads):
            print(part, row, flush=True)
            rows.append(row)
        results[part] = {"load_average": round(os.getloadavg()[0], 1), "rows": rows}
    if given.out is not None:
        about = {
            "processor": processor(),
            "instruction_set": instruction_set(),
            "threads": given.threads,
            "torch": torch.__version__,
            "unit": "ms, median",
        }
        made = given.out.with_suffix(".tmp")
        made.write_text(json.dumps({"about": about, "parts": results}, indent=1) + "\n")
        made.replace(given.out)


if __name__ == "__main__":
    main()
