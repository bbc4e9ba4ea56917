"""Memory and time of pruning a 1.1B-parameter Llama from disk, one block at a time.

    python benchmarks/streaming.py [--work /tmp] [--layers 22] [--texts 16] [--out FILE.json]

The model has random bf16 weights and is made, and deleted, in `--work`; texts of 512 tokens. Every
run is a process of its own, whose memory is read every 10 ms: RssAnon is what it holds itself,
RssFile what the system has mapped of files and takes back when it needs the room. `said` is what
`prune_folder` announces before it starts. `cpu_seconds` are those of the process: they count where
others work on the machine too.
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


def one(folder: Path, out: Path, name: str, texts: int) -> dict[str, Any]:
    """One run, in this process."""
    import torch

    import sparseworks as sw

    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(0, 32000, (1, LENGTH), generator=generator)}
        for _ in range(texts)
    ]
    sw.prune_folder  # noqa: B018 - imports what it needs before memory is looked at
    import transformers.models.llama.modeling_llama  # noqa: F401

    start, peaks, stop = memory(), {"anon": 0, "rss": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            now = memory()
            peaks["anon"] = max(peaks["anon"], now["RssAnon"] + now["RssShmem"])
            peaks["rss"] = max(peaks["rss"], now["VmRSS"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    said: list[Any] = []
    began, cpu = time.perf_counter(), time.process_time()
    result = sw.prune_folder(folder, out, data=data, announce=said.append, **RUNS[name])
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    stop.set()
    watcher.join()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "before_gb": start["RssAnon"] / 1e9,
        "peak_anon_gb": peaks["anon"] / 1e9,
        "peak_rss_gb": peaks["rss"] / 1e9,
        "taken_gb": (peaks["anon"] - start["RssAnon"]) / 1e9,
        "said_gb": said[0].total / 1e9,
        "said": str(said[0]),
        "sparsity": result.sparsity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--one", nargs=3)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.layers)
        return
    if options.one:
        folder, out, name = options.one
        print(json.dumps(one(Path(folder), Path(out), name, options.texts)))
        return
    work = Path(tempfile.mkdtemp(prefix="disk-", dir=options.work))
    try:
        again = [sys.executable, __file__, "--layers", str(options.layers)]
        again += ["--texts", str(options.texts)]
        subprocess.run([*again, "--make", str(work / "model")], check=True)
        size = sum(f.stat().st_size for f in (work / "model").glob("*.safetensors"))
        rows = {}
        for name in options.runs:
            words = [*again, "--one", str(work / "model"), str(work / "out"), name]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            rows[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, json.dumps(rows[name]), flush=True)
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
