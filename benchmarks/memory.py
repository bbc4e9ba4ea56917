"""Peak memory of pruning and saving a Llama-shaped model of random weights, 4 GB in fp32.

    python benchmarks/memory.py [--layers 18] [--out benchmarks/results/memory.json]
    python benchmarks/memory.py --decoder int4 [--layers 6] [--out FILE]

Wanda at 50 %, 16 x 512 calibration tokens; the peak is the process's high-water mark, which
includes the interpreter, torch and transformers. With --decoder: what compiling a decoder of the
model (in bf16) takes beyond it.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

import sparseworks as sw
from sparseworks.diagnostics.memory import begin_peak, kilobytes


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write(rows: dict[str, object], out: Path | None) -> None:
    print(json.dumps(rows, indent=1))
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--decoder", help="dtype of a decoder to compile instead")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632,
        num_hidden_layers=options.layers, num_attention_heads=32, num_key_value_heads=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    with no_init_weights():
        model = LlamaForCausalLM(config)
    for i, parameter in enumerate(model.parameters()):
        parameter.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(i))
    if options.decoder:
        model = model.to(torch.bfloat16).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    if options.decoder:
        begin_peak()
        before = kilobytes("VmHWM")
        start = time.perf_counter()
        decoder = sw.compile_decoder(model, dtype=options.decoder)
        write({
            "model_gb": size, "packed_gb": decoder.report.nbytes / 1e9,
            "beyond_model_gb": (kilobytes("VmHWM") - before) * 1024 / 1e9,
            "compile_s": time.perf_counter() - start, "dtype": options.decoder,
        }, options.out)  # fmt: skip
        return
    rows = {"model_gb": size, "after_build_gb": peak_gb()}
    ids = torch.randint(0, 32000, (16, 512), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    result = sw.prune(model, "wanda", sparsity=0.5, data=[{"input_ids": i[None]} for i in ids])
    rows |= {"prune_s": time.perf_counter() - start, "after_prune_gb": peak_gb()}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        sw.save(model, Path(folder) / "model.safetensors")
        rows |= {"save_s": time.perf_counter() - start, "after_save_gb": peak_gb()}
        rows["file_gb"] = (Path(folder) / "model.safetensors").stat().st_size / 1e9
    rows["sparsity"] = result.sparsity
    write(rows, options.out)


if __name__ == "__main__":
    main()
