"""ResNet-20 on CIFAR-10 made sparse in at most 15 epochs from a trained checkpoint.

    python benchmarks/finetuned.py [--folder runs/finetuned] [--out FILE]    any number of times

Gradual magnitude pruning with a global budget, in two rounds of one-cycle learning rates (0.1,
batch 128, all 50,000 training images): 8 epochs to 80 %, then 7 from there to 80 %, 90 % or 95 %.
Half of the loss is what the dense checkpoint says (`--plain`: the labels alone). Products are in
bfloat16, weights in fp32. Accuracy is of the full test set at the end of a round; nothing is chosen
on it. Finished rounds are files in the folder and are not trained again.

`--big`: in place of the two rounds, one of 15 epochs to each sparsity, where the shared ResNet-56
(89.9 %) is the teacher, with 0.7 of the loss; `sw.compile` runs it.

The second rounds of a seed see the same images, so the teacher's answers are computed once and
kept; their cost is counted in every figure.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.core.masks import attach
from sparseworks.data.images import ImageSet, read_images
from sparseworks.diagnostics.claims import data_root, machine
from sparseworks.diagnostics.metrics import accuracy
from sparseworks.io.atomic import atomic_file
from sparseworks.models.zoo import load_resnet
from sparseworks.training.fitting import Recipe, fit_classifier
from sparseworks.training.hooked import Run

FIRST, FIRST_EPOCHS, SECOND_EPOCHS = 0.8, 8, 7
EPOCHS = FIRST_EPOCHS + SECOND_EPOCHS
BIG_SHARE = 0.7


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
        assert asked == mark, "the rounds do not see the same images"
        self.place += 1
        return answer


class Compiled(nn.Module):
    """A larger model that answers through a compiled plan."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        example = torch.randn(128, 3, 32, 32)
        self.run = sw.compile(model.eval(), example, dtype=torch.bfloat16, threads=1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.run(x.float().contiguous())
        return answer


def round_of(
    model: nn.Module, images: ImageSet, sparsity: float, epochs: int, teacher: nn.Module | None,
    seed: int, distill: float = 0.5,
) -> float:  # fmt: skip
    """Train to a sparsity in place; the CPU seconds used, with the teacher's."""

    def start(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Run:
        return sw.sparsify(
            net, optimizer, "gradual", sparsity=sparsity, steps=steps, budget="global", seed=seed,
            include="*", end=0.5, every=50,
        )  # fmt: skip

    def told(epoch: int, loss: float, run: Run | None) -> None:
        print(f"  {sparsity:g} epoch {epoch + 1} loss {loss:.4f} {time.ctime()}", flush=True)

    known = 0.0
    if isinstance(teacher, Teacher):
        teacher.place, known = 0, teacher.seconds
    began = time.process_time()
    # the cache of cast weights would outlive the optimizer's steps
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        recipe = Recipe(epochs=epochs, distill=distill)
        fit_classifier(
            model, images, recipe, start=start, seed=seed, teacher=teacher, on_epoch=told
        )
    return time.process_time() - began + known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/finetuned"))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="without a teacher")
    parser.add_argument("--big", action="store_true", help="one round, a ResNet-56 as teacher")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = data_root()
    images = read_images(root / "cifar10/train.parquet")
    measure = accuracy(read_images(root / "cifar10/test.parquet").batches(500))
    dense = load_resnet(root / "models/resnet20-cifar10.safetensors")
    dense = dense.to(memory_format=torch.channels_last)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [{"method": "dense checkpoint", "accuracy": measure(dense)}]

    def kept(path: Path, model: nn.Module, epochs: int, train: Callable[[], float]) -> float:
        """Train, or take the row and the model of the run that is there; its CPU seconds."""
        if path.is_file():
            rows.append(json.loads(path.read_text()))
            sw.load(path.with_suffix(".safetensors"), model)
        else:
            seconds = train()
            record = sw.masks(model)
            assert record is not None
            rows.append({
                "method": "gradual", "teacher": said, "sparsity": record.sparsity(), "seed": seed,
                "accuracy": measure(model), "epochs": epochs,
                "cpu_minutes": seconds / 60,
            })  # fmt: skip
            sw.save(model, path.with_suffix(".safetensors"))
            with atomic_file(path) as part:
                part.write_text(json.dumps(rows[-1], indent=1) + "\n")
        print(rows[-1], flush=True)
        return 60.0 * float(rows[-1]["cpu_minutes"])

    said = None if options.plain else "ResNet-56" if options.big else "the checkpoint"
    if options.big:
        for seed in range(options.seeds):
            large = Compiled(load_resnet(root / "models/resnet56-cifar10.safetensors"))
            for sparsity in options.sparsity:
                model = copy.deepcopy(dense)
                kept(
                    options.folder / f"big-{seed}-{sparsity:g}.json", model, EPOCHS,
                    partial(round_of, model, images, sparsity, EPOCHS, large, seed, BIG_SHARE),
                )  # fmt: skip
    else:
        for seed in range(options.seeds):
            teachers = [None if options.plain else Teacher(dense) for _ in range(2)]
            name = f"{'plain-' if options.plain else ''}{seed}"
            first = copy.deepcopy(dense)
            spent = kept(
                options.folder / f"{name}-first.json", first, FIRST_EPOCHS,
                lambda: round_of(first, images, FIRST, FIRST_EPOCHS, teachers[0], seed),  # noqa: B023
            )  # fmt: skip
            for sparsity in options.sparsity:
                model = copy.deepcopy(first)
                attach(model, None)  # its masks may change again
                kept(
                    options.folder / f"{name}-{sparsity:g}.json", model, EPOCHS,
                    lambda: spent + round_of(  # noqa: B023
                        model, images, sparsity, SECOND_EPOCHS, teachers[1], seed + 1000  # noqa: B023
                    ),
                )  # fmt: skip
    if options.out:
        with atomic_file(options.out) as part:
            result = {"machine": machine(), "images": len(images), "rows": rows}
            part.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
