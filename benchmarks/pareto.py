"""Bytes, tokens a second and perplexity of one language model, sparse and quantized.

    python benchmarks/pareto.py [--model FOLDER] [--text FILE] [--calibration FILE] [--out FILE]

By default the small Llama and the novels of SPARSEWORKS_DATA. Weights are pruned by SparseGPT
(128 windows of the calibration text), unstructured, 2:4 and in groups of 16 columns, and kept as
bf16, int8 or int4; beside them the dense model in our formats and in the runtimes that are there.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import sparseworks as sw
from sparseworks.cli.loading import load_model
from sparseworks.data.text import read_text, token_ids
from sparseworks.diagnostics.claims import data_root, machine
from sparseworks.diagnostics.decoding import measure_decoding
from sparseworks.diagnostics.decoding_runtimes import DECODERS, decoding_peers, our_candidate
from sparseworks.report.decoding import decoding_figure

CASES = (  # name, sparsity, pattern, dtypes
    ("dense", 0.0, "", ("bf16", "int8", "int4")),
    ("50 %", 0.5, "unstructured", ("int8", "int4")),
    ("2:4", 0.5, "2:4", ("int8", "int4")),
    ("groups of 16, 50 %", 0.5, "block1x16", ("int4",)),
    ("75 %", 0.75, "unstructured", ("int8",)),
    ("90 %", 0.9, "unstructured", ("int8",)),
)
WINDOW = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--calibration")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    loaded = load_model(options.model or str(data_root() / "models" / "novel-llama-6m"))
    texts = data_root() / "text"

    def windows(path: Any, count: int) -> torch.Tensor:
        ids = token_ids(read_text(str(path)), loaded.tokenizer)
        return ids[: ids.numel() // WINDOW * WINDOW].view(-1, WINDOW)[:count]

    calibration = windows(options.calibration or texts / "novels-train.txt", 128)
    text = windows(options.text or texts / "novels-valid.txt", 32)
    model, threads = loaded.model, torch.get_num_threads()
    notes: list[str] = []
    candidates = []
    with tempfile.TemporaryDirectory() as place:
        for name, sparsity, pattern, dtypes in CASES:
            twin = copy.deepcopy(model)
            if sparsity:
                sw.prune(twin, "sparsegpt", sparsity=sparsity, pattern=pattern,
                         data=list(calibration.split(8)))  # fmt: skip
            for dtype in dtypes:
                made = sw.compile_decoder(twin, dtype=dtype)
                candidates.append(our_candidate(f"ours, {name}, {dtype}", made))
        candidates += decoding_peers(
            model, DECODERS, threads, Path(place), notes, loaded.tokenizer
        )  # fmt: skip
        rows = measure_decoding(
            candidates, model.config.vocab_size, repeat=options.repeat, text=text
        )
    result = {"machine": machine(), "model": Path(loaded.name).name, "rows": rows, "notes": notes}
    for row in rows:
        print(f"{row['candidate']:32s} {row['bytes'] / 1e6:6.2f} MB "
              f"{row['decode_tokens_per_second']:7.0f} tokens/s  perplexity "
              f"{row['perplexity']:7.2f}")  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        decoding_figure(result).write_html(options.out.with_suffix(".html"))


if __name__ == "__main__":
    main()
