"""Sparse-Wide at the cost of a dense network of a fraction of its width.

The quick setting trains a perceptron to its end and rewires it often: 7 epochs of a residual
network decided nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.judging import LOOKS
from sparseworks.diagnostics.subjects import (
    digits_subject,
    image_subject,
    loss_and_accuracy,
    perceptron,
)
from sparseworks.models.zoo import resnet20
from sparseworks.training.fitting import Recipe, fit_classifier

SIZE = 16  # pixels a side; the shares of the layers' costs are those of 32


def nonzero_macs(model: nn.Module, image: torch.Tensor) -> int:
    """Every non-zero weight once per output place, counted by running one image."""
    counted: list[int] = []

    def count(module: nn.Module, args: object, output: torch.Tensor) -> None:
        places = output.numel() // module.weight.shape[0]
        counted.append(places * int(torch.count_nonzero(module.weight)))

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(count) for m in layers]
    with torch.no_grad():
        model.eval()(image)
    for handle in handles:
        handle.remove()
    return sum(counted)


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    held: Callable[[nn.Module], float]
    if full:
        train, held = image_subject(seed, 50_000, size=SIZE, held=5_000)
        recipe = Recipe(epochs=15, batch_size=64)
    else:
        train, test = digits_subject(seed, 600)
        recipe = Recipe(epochs=40, batch_size=50, lr=0.05, augment=False)

        def held(model: nn.Module) -> float:
            return loss_and_accuracy(model, test)[1]

    def fresh(wide: bool) -> nn.Module:
        torch.manual_seed(seed)
        if full:
            return resnet20(width=16 if wide else 8).to(memory_format=torch.channels_last)
        width = 64 if wide else 16
        return perceptron(seed, 64, width, width, 10)

    image = train.normalized(slice(0, 1))
    steps = recipe.epochs * (len(train) // recipe.batch_size)
    found, costs = {}, {}
    for case in ("dense", "rigl", "static"):
        model = fresh(case != "dense")
        start = None
        if case != "dense":
            job = sw.transform(
                model, "sparse-ift", member="wide", rewire=case, every=100 if full else 10,
                steps=steps, seed=seed, exclude="conv1" if full else (), include="*",
                dense=fresh(False), example=image,
            )  # fmt: skip
            found["sparsity"] = job.sparsity

            def start(net, optimizer, steps, job=job):
                return job.attach(optimizer)

        fit_classifier(model, train, recipe, start=start, seed=seed)
        found[f"{case} accuracy"] = held(model)
        costs[case] = nonzero_macs(model, image)
    found["dense multiply-adds"] = float(costs["dense"])
    found["cost deviation %"] = max(
        abs(costs[c] / costs["dense"] - 1) * 100 for c in ("rigl", "static")
    )
    found["equal cost"] = 0.5 - found["cost deviation %"]
    found["wide over dense"] = found["rigl accuracy"] - found["dense accuracy"]
    found["rigl over static"] = found["rigl accuracy"] - found["static accuracy"] + 0.5
    return found


CLAIM = Claim(
    card="003",
    method="sparse-ift",
    title="a wider network with few weights beats the dense network of equal cost",
    model="a 64-16-16-10 perceptron, dense, against 64-64-64-10, sparse; from scratch (full: "
    "ResNet-20 of width 8 and 16)",
    data="scikit-learn's digits: 600 to train for 40 epochs, 1,197 to test (full: CIFAR-10 at "
    "16 x 16 for 15 epochs, 5,000 test images)",
    baseline="the dense network; random masks that never move",
    metric="test accuracy, points; multiply-adds of non-zero weights",
    promises=(
        Promise("equal cost", "multiply-adds within 0.5 % of the dense network's", exact=True),
        Promise("wide over dense", "Sparse-Wide with RigL above dense", margin=1.0,
                negligible=0.5),
        Promise("rigl over static", "RigL at most half a point below static masks"),
    ),
    measure=measure,
    looks=LOOKS,
    version=2,
)  # fmt: skip
