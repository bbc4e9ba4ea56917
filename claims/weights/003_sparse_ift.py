"""Sparse-Wide at the cost of a dense ResNet-20 of half the width, on a small part of CIFAR-10."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import image_subject
from sparseworks.models.zoo import resnet20
from sparseworks.training.fitting import Recipe, fit_classifier

SIZE = 16  # pixels a side; the shares of the layers' costs are those of 32


def nonzero_macs(model: nn.Module) -> int:
    """Every non-zero weight once per output place, counted by running one image."""
    counted: list[int] = []

    def count(module: nn.Module, args: object, output: torch.Tensor) -> None:
        places = output.numel() // module.weight.shape[0]
        counted.append(places * int(torch.count_nonzero(module.weight)))

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(count) for m in layers]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, SIZE, SIZE))
    for handle in handles:
        handle.remove()
    return sum(counted)


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    train, held = image_subject(seed, 50_000 if full else 5_000, size=SIZE, held=5_000)
    recipe = Recipe(epochs=15 if full else 7, batch_size=64)
    steps = recipe.epochs * (len(train) // recipe.batch_size)
    found, costs = {}, {}
    for case in ("dense", "rigl", "static"):
        torch.manual_seed(seed)
        model = resnet20(width=8 if case == "dense" else 16).to(memory_format=torch.channels_last)
        start = None
        if case != "dense":
            job = sw.transform(
                model, "sparse-ift", member="wide", rewire=case, every=100 if full else 20,
                steps=steps, seed=seed, exclude="conv1", dense=resnet20(width=8),
                example=torch.zeros(1, 3, SIZE, SIZE),
            )  # fmt: skip
            found["sparsity"] = job.sparsity

            def start(net, optimizer, steps, job=job):
                return job.attach(optimizer)

        fit_classifier(model, train, recipe, start=start, seed=seed)
        found[f"{case} accuracy"] = held(model)
        costs[case] = nonzero_macs(model)
    found["dense multiply-adds"] = float(costs["dense"])
    found["cost deviation %"] = max(
        abs(costs[c] / costs["dense"] - 1) * 100 for c in ("rigl", "static")
    )
    found["equal cost"] = 0.5 - found["cost deviation %"]
    found["wide over dense"] = found["rigl accuracy"] - found["dense accuracy"]
    found["rigl over static"] = found["rigl accuracy"] - found["static accuracy"]
    return found


CLAIM = Claim(
    card="003",
    method="sparse-ift",
    title="twice the width at a quarter of the density beats the dense network of equal cost",
    model="ResNet-20 of width 8, dense, against width 16, sparse; from scratch",
    data="CIFAR-10 at 16 x 16: 5,000 training images for 7 epochs, 5,000 test images (full: all "
    "and 15)",
    baseline="the dense network; random masks that never move",
    metric="test accuracy, points; multiply-adds of non-zero weights",
    promises=(
        Promise("equal cost", "multiply-adds within 0.5 % of the dense network's", exact=True),
        Promise("wide over dense", "Sparse-Wide with RigL above dense", margin=1.0),
        Promise("rigl over static", "RigL not below static masks"),
    ),
    measure=measure,
)
