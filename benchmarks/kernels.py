"""Time the sparse products against torch: medians over interleaved calls, as JSON.

y = W x with bf16 values against torch fp32 dense;
Y = X W^T in fp32 against torch's CSR product.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sparseworks.kernels import instruction_set, pack_mask, pack_rows, spmm, spmv

SIZE = 4096


def times(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call; every call runs in every round."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn >= 2:
                seen[name].append(1e3 * (time.perf_counter() - begin))
    return {name: round(statistics.median(values), 4) for name, values in seen.items()}


def processor() -> str:
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    weight, noise = torch.randn(SIZE, SIZE), torch.rand(SIZE, SIZE)
    x, batch = torch.randn(SIZE), torch.randn(256, SIZE)
    rows: list[dict[str, object]] = []
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        kept = weight * (noise >= sparsity)
        masked = pack_mask(kept)
        got = times(
            {
                "ours": lambda p=masked: spmv(p, x, threads=given.threads),
                "peer": lambda: torch.nn.functional.linear(x, weight),
            },
            given.repeats * 3,
        )
        rows.append({"case": "spmv bf16 / torch fp32 dense", "sparsity": sparsity, **got})
        if sparsity >= 0.8:
            packed, csr, right = pack_rows(kept), kept.to_sparse_csr(), batch.t().contiguous()
            got = times(
                {
                    "ours": lambda p=packed: spmm(p, batch, threads=given.threads),
                    "peer": lambda c=csr, r=right: c @ r,
                },
                given.repeats,
            )
            rate = 2 * packed.nnz * len(batch) / (float(got["ours"]) * 1e6)
            rows.append(
                {
                    "case": "spmm fp32, batch 256 / torch CSR",
                    "sparsity": sparsity,
                    **got,
                    "useful_gflops": round(rate, 1),
                }
            )
    for row in rows:
        row["ratio"] = round(float(str(row["peer"])) / float(str(row["ours"])), 2)
        print(row)
    if given.out is not None:
        about = {
            "processor": processor(),
            "instruction_set": instruction_set(),
            "threads": given.threads,
            "torch": torch.__version__,
            "load_average": round(os.getloadavg()[0], 1),
            "size": SIZE,
            "unit": "ms, median",
        }
        made = given.out.with_suffix(".tmp")
        made.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        made.replace(given.out)


if __name__ == "__main__":
    main()
