"""Tokens a second at batch 1: `sparseworks.compile_decoder` beside transformers, in one run.

    python benchmarks/decoding.py [--sparsity 0.5 0.9] [--layers 4] [--width 2048] [--out FILE]

A Llama of random weights (speed does not depend on their values), pruned by magnitude in every
linear layer; greedy generation from a prompt of 16 tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparseworks as sw
from sparseworks.diagnostics.claims import machine


def rate(generate: Any, tokens: int, repeat: int) -> float:
    """Median tokens a second."""
    generate()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        generate()
        times.append(time.perf_counter() - start)
    return tokens / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.9])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 256, eos_token_id=None,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 32_000, (1, 16))
    rows: list[dict[str, Any]] = []
    for sparsity in options.sparsity:
        model = copy.deepcopy(dense)
        sw.prune(model, "magnitude", sparsity=sparsity)
        half = copy.deepcopy(model).bfloat16()
        candidates = {
            "transformers fp32": lambda m=model: m.generate(
                ids, max_new_tokens=options.tokens, do_sample=False, pad_token_id=0
            ),
            "transformers bf16": lambda m=half: m.generate(
                ids, max_new_tokens=options.tokens, do_sample=False, pad_token_id=0
            ),
        }
        for name, int8 in (("ours, bf16 values", False), ("ours, int8 where faster", True)):
            decoder = sw.compile_decoder(model, int8=int8)
            candidates[name] = lambda d=decoder: d.generate(ids, options.tokens)
        for name, generate in candidates.items():
            found = rate(generate, options.tokens, options.repeat)
            rows.append({"sparsity": sparsity, "candidate": name, "tokens_per_second": found})
            print(f"{sparsity:.0%}  {name:26s} {found:7.1f} tokens/s", flush=True)
    if options.out:
        size = {"layers": options.layers, "width": options.width}
        text = json.dumps({"machine": machine(), "model": size, "rows": rows}, indent=1)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
