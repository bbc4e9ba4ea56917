"""ResNet-20 on CIFAR-10 made sparse in 15 epochs from a trained checkpoint.

    python benchmarks/finetuned.py [--sparsity 0.9 0.8 0.95] [--seeds 1] [--out FILE]

Gradual magnitude pruning with a global budget and the dense checkpoint as teacher (`--plain`:
without); all 50,000 training images, one-cycle rate 0.1, batch 128, products in bfloat16 with fp32
weights. Accuracy is of the full test set at the end of training; nothing is chosen on it. All runs
of one seed see the same images, so the teacher's answers to them are computed once and kept; their
cost is counted in every run.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.data.images import ImageSet, read_images
from sparseworks.diagnostics.claims import data_root, machine
from sparseworks.diagnostics.metrics import accuracy
from sparseworks.io.atomic import atomic_file
from sparseworks.models.zoo import load_resnet
from sparseworks.training.fitting import Recipe, fit_classifier
from sparseworks.training.hooked import Run

EPOCHS = 15


class Teacher(nn.Module):
    """A model that remembers its answers to a sequence of batches, and what they cost."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        self.answers: list[tuple[float, Tensor]] = []
        self.place = 0
        self.seconds = 0.0  # of all answers

    def forward(self, x: Tensor) -> Tensor:
        mark = float(x.double().sum())
        if self.place == len(self.answers):
            began = time.process_time()
            self.answers.append((mark, self.model(x).float()))
            self.seconds += time.process_time() - began
        asked, answer = self.answers[self.place]
        assert asked == mark, "the runs do not see the same images"
        self.place += 1
        return answer


def train(
    dense: nn.Module, images: ImageSet, sparsity: float, method: str, teacher: Teacher | None,
    seed: int,
) -> tuple[nn.Module, float]:  # fmt: skip
    """The sparse model, and the CPU seconds used."""
    model = copy.deepcopy(dense)

    def start(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Run:
        return sw.sparsify(
            net, optimizer, method, sparsity=sparsity, steps=steps, budget="global", seed=seed,
            include="*", **({"end": 0.65} if method == "gradual" else {}),
        )  # fmt: skip

    def told(epoch: int, loss: float, run: Run | None) -> None:
        print(f"  {sparsity:g} epoch {epoch + 1} loss {loss:.4f} {time.ctime()}", flush=True)

    known = 0.0
    if teacher is not None:
        teacher.place, known = 0, teacher.seconds
    began = time.process_time()
    # the cache of cast weights would outlive the optimizer's steps
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        recipe = Recipe(epochs=EPOCHS)
        fit_classifier(
            model, images, recipe, start=start, seed=seed, teacher=teacher, on_epoch=told
        )
    return model, time.process_time() - began + known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.8, 0.95])
    parser.add_argument("--method", default="gradual")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="without a teacher")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = data_root()
    images = read_images(root / "cifar10/train.parquet")
    measure = accuracy(read_images(root / "cifar10/test.parquet").batches(500))
    dense = load_resnet(root / "models/resnet20-cifar10.safetensors")
    dense = dense.to(memory_format=torch.channels_last)
    rows: list[dict[str, Any]] = [{"method": "dense checkpoint", "accuracy": measure(dense)}]
    for seed in range(options.seeds):
        teacher = None if options.plain else Teacher(dense)
        for sparsity in options.sparsity:
            model, seconds = train(dense, images, sparsity, options.method, teacher, seed)
            rows.append({
                "method": options.method, "teacher": not options.plain, "sparsity": sparsity,
                "reached": sw.masks(model).sparsity(), "seed": seed, "accuracy": measure(model),
                "epochs": EPOCHS, "cpu_minutes": seconds / 60,
            })  # fmt: skip
            print(rows[-1], flush=True)
            if options.out:
                with atomic_file(options.out) as part:
                    result = {"machine": machine(), "images": len(images), "rows": rows}
                    part.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
