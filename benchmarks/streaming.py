"""Memory and time of pruning a 1.1B-parameter Llama from disk, one block at a time.

    python benchmarks/streaming.py [--work /tmp] [--layers 22] [--texts 16] [--out FILE.json]

The model has random bf16 weights and is made, and deleted, in `--work`; texts of 512 tokens. Every
run is a process of its own, whose memory is read every 10 ms: RssAnon is what it holds itself,
RssFile what the system has mapped of files and takes back when it needs the room. `said` is what
`prune_folder` announces before it starts. `cpu_seconds` are those of the process without those of
reading its memory: they count where others work on the machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LENGTH = 512
RUNS: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "wanda 2:4, spilled": {"method": "wanda", "pattern": "2:4", "spill": True},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "sparsegpt, spilled": {"method": "sparsegpt", "sparsity": 0.5, "spill": True},
}


def make(folder: Path, layers: int) -> None:
    """TinyLlama's shape: 2048 wide, 5632 in the MLP, 32 heads on 4 of keys and values."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")


def memory() -> dict[str, int]:
    """Bytes of this process by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {k: int(v.split()[0]) * 1024 for k, _, v in (x.partition(":") for x in lines)
            if k.startswith(("Rss", "VmRSS"))}  # fmt: skip


def batches(texts: int) -> list[Any]:
    """Random tokens, one text a batch."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 32000, (1, LENGTH), generator=generator) for _ in range(texts)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def ours(folder: Path, out: Path, name: str, texts: int) -> dict[str, Any]:
    """Ready to be run: returns the call, which returns what else is known of it."""
    import transformers.conversion_mapping
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import core_model_loading  # noqa: F401

    import sparseworks as sw

    data, said, prune = batches(texts), [], sw.prune_folder

    def run() -> dict[str, Any]:
        result = prune(folder, out, data=data, announce=said.append, **RUNS[name])
        told: Any = said[0]
        return {
            "sparsity": result.sparsity, "said_gb": told.total / 1e9, "said": str(told),
            "pruning_seconds": sum(t.seconds for t in result.tensors),
        }  # fmt: skip

    return {"run": run}


def peer(folder: Path, out: Path, name: str, texts: int) -> dict[str, Any]:
    """llm-compressor, its sequential pipeline, saved as it saves."""
    import llmcompressor
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from tokenizers import Tokenizer, models
    from torch.utils.data import DataLoader
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    kind = WandaPruningModifier if name.startswith("wanda") else SparseGPTModifier
    loader: Any = DataLoader(batches(texts), batch_size=None)
    unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0})))

    def run() -> dict[str, Any]:
        model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
        recipe = kind(
            sparsity=0.5, mask_structure="0:0", targets=["re:.*layers.*proj$"], ignore=["lm_head"]
        )
        llmcompressor.oneshot(
            model=model, dataset=loader, recipe=recipe, pipeline="sequential",
            num_calibration_samples=texts, processor=unused,
        )  # fmt: skip
        model.save_pretrained(out)
        weight = model.model.layers[0].mlp.up_proj.weight
        return {"sparsity": float((weight == 0).float().mean())}

    return {"run": run, "version": llmcompressor.__version__}


def one(folder: Path, out: Path, name: str, texts: int, of: str) -> dict[str, Any]:
    """One run, in this process."""
    ready = (peer if of == "peer" else ours)(folder, out, name, texts)
    start, peaks, stop = memory(), {"anon": 0, "rss": 0}, threading.Event()
    watching = 0.0

    def watch() -> None:
        nonlocal watching
        while not stop.wait(0.01):
            now = memory()
            peaks["anon"] = max(peaks["anon"], now["RssAnon"] + now["RssShmem"])
            peaks["rss"] = max(peaks["rss"], now["VmRSS"])
        watching = time.thread_time()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, cpu = time.perf_counter(), time.process_time()
    found = ready.pop("run")()
    seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    cpu = time.process_time() - cpu - watching
    return {
        **ready,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "before_gb": start["RssAnon"] / 1e9,
        "peak_anon_gb": peaks["anon"] / 1e9,
        "peak_rss_gb": peaks["rss"] / 1e9,
        "taken_gb": (peaks["anon"] - start["RssAnon"]) / 1e9,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--peer", help="a Python that has llm-compressor")
    parser.add_argument("--one", nargs=4)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.layers)
        return
    if options.one:
        folder, out, name, of = options.one
        print(json.dumps(one(Path(folder), Path(out), name, options.texts, of)))
        return
    work = Path(tempfile.mkdtemp(prefix="disk-", dir=options.work))
    try:
        again = [__file__, "--layers", str(options.layers), "--texts", str(options.texts)]
        subprocess.run([sys.executable, *again, "--make", str(work / "model")], check=True)
        size = sum(f.stat().st_size for f in (work / "model").glob("*.safetensors"))
        rows = {}
        pythons = {"ours": sys.executable} | ({"peer": options.peer} if options.peer else {})
        for name in options.runs:
            for of, python in pythons.items():
                if of == "peer" and name not in ("wanda", "sparsegpt"):
                    continue
                # -P: else transformers takes kernels.py beside this file for a package of hers
                words = [
                    python,
                    "-P",
                    *again,
                    "--one",
                    str(work / "model"),
                    str(work / "out"),
                    name,
                    of,
                ]
                done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                row = json.loads(done.stdout.splitlines()[-1])
                row["cpu_seconds_per_block"] = row["cpu_seconds"] / options.layers
                rows[name if of == "ours" else f"{name}, llm-compressor"] = row
                print(name, of, json.dumps(row), flush=True)
                shutil.rmtree(work / "out")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    import torch

    found = {
        "model_gb": size / 1e9,
        "layers": options.layers,
        "tokens": options.texts * LENGTH,
        "machine": {
            "cpu": platform.processor(), "torch": torch.__version__,
            "threads": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads())),
            "load": os.getloadavg()[0],
        },
        "rows": rows,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
