"""Tokens a second of `sparseworks.compile_decoder` beside llama.cpp, all in one run.

    python benchmarks/decoding.py [--shape big|small] [--repeat 5] [--out FILE]

A Llama of random weights (speed does not depend on their values), pruned at random in every linear
layer but the head. llama.cpp comes with `pip install llama-cpp-python gguf`,
onnxruntime-genai with `pip install onnxruntime-genai onnx onnx-ir`. Decoding goes on from
a prompt of 64 tokens and from a context of 2,000; prompts are of 64 and 512 tokens; eight texts at
once with int4.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparseworks as sw
from sparseworks.diagnostics.claims import machine
from sparseworks.diagnostics.decoding import Candidate, measure_decoding
from sparseworks.diagnostics.decoding_runtimes import (
    decoding_peers,
    llama_cpp_candidate,
    our_candidate,
)
from sparseworks.engine.decoder.packing import read_bandwidth

SHAPES = {"big": (2048, 5632, 6, 32), "small": (1024, 2816, 8, 16)}
# name, sparsity, pattern, dtype, head, the peer that its floor names
CASES = (
    ("dense bf16", 0.0, "", "bf16", None, "F16"),
    ("dense int8", 0.0, "", "int8", None, "Q8_0"),
    ("dense int4", 0.0, "", "int4", None, "Q4_0"),
    ("50 % int8", 0.5, "unstructured", "int8", None, "Q8_0"),
    ("2:4 int8", 0.5, "2:4", "int8", None, "Q8_0"),
    ("50 % groups of 16, int4", 0.5, "groups", "int4", None, "Q4_0"),
    ("75 % int8, head int4", 0.75, "unstructured", "int8", "int4", "Q4_0"),
    ("80 % int8", 0.8, "unstructured", "int8", None, "Q8_0"),
    ("90 % int8, head int4", 0.9, "unstructured", "int8", "int4", "Q4_0"),
)


def llama(shape: str) -> LlamaForCausalLM:
    width, hidden, layers, heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=4, max_position_embeddings=4096,
        tie_word_embeddings=False, eos_token_id=None, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@torch.no_grad()
def pruned(model: LlamaForCausalLM, sparsity: float, pattern: str) -> LlamaForCausalLM:
    if sparsity == 0:
        return model
    twin = copy.deepcopy(model)
    for name, layer in twin.named_modules():
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        rows, columns = layer.weight.shape
        if pattern == "2:4":
            kept = torch.rand(rows, columns // 4, 4).argsort(-1).lt(2).flatten(1)
        elif pattern == "groups":
            kept = (torch.rand(rows, columns // 16) >= sparsity).repeat_interleave(16, 1)
        else:
            kept = torch.rand(rows, columns) >= sparsity
        layer.weight.mul_(kept)
    return twin


def together(decoder: Any, texts: int, repeat: int) -> float:
    """Tokens a second of so many texts at once."""
    from sparseworks.engine.decoder.generating import DecoderCache

    past = DecoderCache(decoder.native)
    past.start(texts, 512)
    decoder(torch.randint(3, 32_000, (texts, 64)), cache=past, logits_to_keep=1)
    one, times = torch.full((texts, 1), 5), []
    for _ in range(12 * repeat):
        start = time.perf_counter()
        decoder(one, cache=past)
        times.append(time.perf_counter() - start)
    return texts / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="big")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    model = llama(options.shape)
    candidates: list[Candidate] = []
    decoders: dict[str, Any] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        peers = [
            llama_cpp_candidate(model, t, threads, Path(place)) for t in ("F16", "Q8_0", "Q4_0")
        ]
        peers += decoding_peers(model, ["onnxruntime-genai"], threads, Path(place), notes)
        for name, sparsity, pattern, dtype, head, _ in CASES:
            start = time.perf_counter()
            made = sw.compile_decoder(pruned(model, sparsity, pattern), dtype=dtype, head=head)
            print(f"{name}: {made.report.nbytes / 1e6:.0f} MB, compiled in "
                  f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
            decoders[name] = made
            candidates.append(our_candidate(name, made))
        everything = [*peers, *candidates]
        rows = measure_decoding(everything, 32_000, repeat=options.repeat)
        some = [c for c in everything if c.name in ("llama.cpp Q8_0", "llama.cpp Q4_0",
                                                    "dense int8", "dense int4")]  # fmt: skip
        long = measure_decoding(some, 32_000, prompts=(64,), context=2000, repeat=2)
        one = together(decoders["dense int4"], 1, options.repeat)
        eight = together(decoders["dense int4"], 8, options.repeat)
    read = read_bandwidth(threads)
    by_name = {r["candidate"]: r for r in rows}
    for row in rows:
        row["share_of_read_bandwidth"] = row["bytes"] * row["decode_tokens_per_second"] / read
    for name, *_, peer in CASES:
        mine, theirs = by_name[name], by_name[f"llama.cpp {peer}"]
        mine["peer"] = f"llama.cpp {peer}"
        for key in [k for k in mine if k.endswith("tokens_per_second")]:
            mine[key.replace("tokens_per_second", "ratio")] = mine[key] / theirs[key]
    for row in long:
        short = by_name[row["candidate"]]["decode_tokens_per_second"]
        row["share_of_short_context"] = row["decode_tokens_per_second"] / short
    result = {
        "machine": machine(), "shape": options.shape, "read_gb_per_second": read / 1e9,
        "rows": rows, "context_2000": long,
        "int4_texts_at_once": {"1": one, "8": eight, "ratio": eight / one}, "notes": notes,
    }  # fmt: skip
    for row in rows:
        print(f"{row['candidate']:26s} {row['decode_tokens_per_second']:7.1f} tokens/s  "
              f"{row.get('decode_ratio', 1):5.2f}x {row.get('peer', ''):15s} prompts "
              f"{row['prompt_64_tokens_per_second']:6.0f} "
              f"{row['prompt_512_tokens_per_second']:6.0f}"
              f"  {row['share_of_read_bandwidth']:4.0%} of {read / 1e9:.1f} GB/s")  # fmt: skip
    for row in long:
        print(f"context of 2000: {row['candidate']:18s} {row['decode_tokens_per_second']:7.1f} "
              f"tokens/s, {row['share_of_short_context']:.0%} of a short one")  # fmt: skip
    print(f"int4, 8 texts at once: {eight:.0f} tokens/s, {eight / one:.1f}x one text")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
