"""ResNet-20 on CIFAR-10 made sparse in 15 epochs from a trained checkpoint.

    python benchmarks/finetuned.py [--sparsity 0.8 0.9 0.95] [--seeds 1] [--out FILE]

Gradual magnitude pruning with a global budget, alone and with the dense checkpoint as teacher; all
50,000 training images, one-cycle rate 0.1, batch 128. Accuracy is of the full test set at the end
of training; nothing is chosen on it.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

import sparseworks as sw
from sparseworks.data.images import read_images
from sparseworks.diagnostics.claims import data_root, machine
from sparseworks.diagnostics.metrics import accuracy
from sparseworks.models.zoo import load_resnet
from sparseworks.training.fitting import Recipe, fit_classifier


def train(
    dense: torch.nn.Module, images: Any, sparsity: float, method: str, taught: bool, seed: int
) -> tuple[torch.nn.Module, float]:
    model = copy.deepcopy(dense)

    def start(net, optimizer, steps):
        return sw.sparsify(
            net, optimizer, method, sparsity=sparsity, steps=steps, budget="global", seed=seed,
            include="*",
        )  # fmt: skip

    began = time.perf_counter()
    recipe = Recipe(epochs=15)
    teacher = copy.deepcopy(dense).eval() if taught else None
    fit_classifier(model, images, recipe, start=start, seed=seed, teacher=teacher)
    return model, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.8, 0.95])
    parser.add_argument("--method", default="gradual")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="without a teacher")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    root = data_root()
    images = read_images(root / "cifar10/train.parquet")
    measure = accuracy(read_images(root / "cifar10/test.parquet").batches(500))
    dense = load_resnet(root / "models/resnet20-cifar10.safetensors")
    dense = dense.to(memory_format=torch.channels_last)
    rows: list[dict[str, Any]] = [{"method": "dense checkpoint", "accuracy": measure(dense)}]
    for sparsity in options.sparsity:
        for seed in range(options.seeds):
            model, seconds = train(dense, images, sparsity, options.method, not options.plain, seed)
            rows.append({
                "method": options.method, "teacher": not options.plain, "sparsity": sparsity,
                "reached": sw.masks(model).sparsity(), "seed": seed, "accuracy": measure(model),
                "minutes": seconds / 60,
            })  # fmt: skip
            print(rows[-1], flush=True)
            if options.out:
                text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
                options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
