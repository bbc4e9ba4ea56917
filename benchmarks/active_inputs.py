"""Time a Llama of 395M parameters that reads only the columns of its active inputs.

    python benchmarks/active_inputs.py [--shape big|small] [--repeat 9] [--out FILE]

Of each dtype: the format that is fastest for all inputs; columns, all of them; columns of half of
the inputs of every layer (TEAL's thresholds; weights and inputs are random, and so is which half),
with and without the head's. In turns; ratios are of medians of the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import sparseworks as sw
from decoding import SHAPES, llama
from sparseworks.diagnostics.decoding import measure_decoding
from sparseworks.diagnostics.decoding_runtimes import our_candidate
from sparseworks.diagnostics.machines import machine
from sparseworks.engine.decoder import packing


def decoders(shape: str) -> dict[tuple[str, str], Any]:
    model = llama(shape)
    ids = torch.randint(0, 32_000, (4, 64))
    found = {(t, "all"): sw.compile_decoder(model, dtype=t) for t in packing.GATHERED}
    for dtype, format in packing.GATHERED.items():
        with mock.patch.dict(packing.DTYPES, {dtype: (format,)}):
            found[dtype, "all, by columns"] = sw.compile_decoder(model, dtype=dtype)
    for name, more in (("half, head whole", {}), ("half", {"include": "*", "exclude": ()})):
        options: dict[str, Any] = {"sparsity": 0.5, "per": "input", "data": [ids], **more}
        run = sw.sparse_activations(model, "teal", **options)
        for dtype in packing.GATHERED:
            found[dtype, name] = sw.compile_decoder(model, dtype=dtype)
        run.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="big")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    made = decoders(options.shape)
    candidates = [our_candidate(f"{t}, {name}", d) for (t, name), d in made.items()]
    rows = measure_decoding(candidates, 32_000, prompts=(64,), repeat=options.repeat)
    speed = {r["candidate"]: r["decode_tokens_per_second"] for r in rows}
    for row, ((dtype, _), decoder) in zip(rows, made.items(), strict=True):
        row["read_bytes"] = decoder.report.read
        row["over_all"] = speed[row["candidate"]] / speed[f"{dtype}, all"]
        row["over_all_by_columns"] = speed[row["candidate"]] / speed[f"{dtype}, all, by columns"]
        print(f"{row['candidate']:24s} {row['decode_tokens_per_second']:7.1f} tokens/s, "
              f"{row['read_bytes'] / 1e6:6.1f} MB a token, {row['over_all']:.2f}x all, "
              f"{row['over_all_by_columns']:.2f}x all by columns")  # fmt: skip
    result = {"machine": machine(), "shape": options.shape,
              "read_gb_per_second": packing.read_bandwidth(torch.get_num_threads()) / 1e9,
              "rows": rows}  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
