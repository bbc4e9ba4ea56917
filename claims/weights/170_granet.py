"""GraNet against gradual pruning, RigL and a static mask, and what regeneration repairs.

The quick setting trains a small network for many epochs: rewiring pays over many updates.
Plasticity is what an epoch of training adds to the accuracy before the cut; recorded too: to that
right after it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.data.images import ImageSet
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import (
    digits_subject,
    image_subject,
    loss_and_accuracy,
    perceptron,
)
from sparseworks.models.zoo import resnet20
from sparseworks.training.fitting import Recipe, fit_classifier
from sparseworks.weights.dynamic.masks import drop_and_grow

CASES = {
    "granet": {"initial_density": 0.5},
    "gradual": {},
    "rigl": {},
    "static": {},
}
PRUNED, SWAPPED = 0.9, 0.5  # of the plasticity study: cut at once, then swapped per tensor


def _fresh(seed: int, full: bool) -> nn.Module:
    torch.manual_seed(seed)
    return (
        resnet20().to(memory_format=torch.channels_last)
        if full
        else perceptron(seed, 64, 256, 256, 10)
    )


def _continued(
    dense: nn.Module, train: ImageSet, seed: int, lr: float, swap: bool, augmented: bool
) -> nn.Module:
    """Prune at once, swap weights or not, and train on for one epoch at a constant rate."""
    model = copy.deepcopy(dense)
    sw.prune(model, "magnitude", sparsity=PRUNED, budget="global", include="*")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    generator = torch.Generator().manual_seed(seed)
    batches = list(train.epoch(50, generator, training=augmented))
    model.train()
    gradients: Mapping[str, torch.Tensor] = {}
    if swap:
        x, y = batches[0]
        F.cross_entropy(model(x), y).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    run = sw.sparsify(model, optimizer, "fixed")
    for name in run.masks if swap else ():
        count = math.ceil(SWAPPED * int(torch.count_nonzero(run.masks[name])))
        drop_and_grow(run, name, count, gradients[name].abs())
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    run.finish()
    return model


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    held: Callable[[nn.Module], float]
    if full:
        train, held = image_subject(seed, 50_000)
        recipe, sparsity, every = Recipe(epochs=15, batch_size=100), 0.95, 75
    else:
        train, test = digits_subject(seed)
        recipe = Recipe(epochs=40, batch_size=50, lr=0.05, augment=False)
        sparsity, every = 0.98, 20

        def held(model: nn.Module) -> float:
            return loss_and_accuracy(model, test)[1]

    found: dict[str, float] = {}
    for method, options in CASES.items():
        model = _fresh(seed, full)
        if method != "static":
            options = {**options, "every": every}

        def start(net, optimizer, steps, method=method, options=options):
            return sw.sparsify(
                net, optimizer, method, sparsity=sparsity, steps=steps, seed=seed, include="*",
                **options,
            )  # fmt: skip

        run = fit_classifier(model, train, recipe, start=start, seed=seed)
        assert abs(run.record().sparsity() - sparsity) < 1e-4, method
        found[f"{method} accuracy"] = held(model)

    moments = {"early": recipe.epochs // 3, "late": recipe.epochs - 2}  # epochs before the cut
    parts: dict[str, tuple[nn.Module, float]] = {}
    dense = _fresh(seed, full)
    optimizers = []

    def keep(epoch: int, loss: float, run: object) -> None:
        for moment, after in moments.items():
            if epoch + 1 == after:
                parts[moment] = (copy.deepcopy(dense), optimizers[0].param_groups[0]["lr"])

    fit_classifier(
        dense, train, recipe, seed=seed, on_epoch=keep, start=lambda m, o, s: optimizers.append(o)
    )
    found["dense accuracy"] = held(dense)
    for moment, (model, lr) in parts.items():
        cut = copy.deepcopy(model)
        sw.prune(cut, "magnitude", sparsity=PRUNED, budget="global", include="*")
        before, after_cut = held(model), held(cut)
        for swap, name in ((False, "without"), (True, "with")):
            after = held(_continued(model, train, seed, lr, swap, recipe.augment))
            found[f"{moment} plasticity {name} regeneration"] = after - before
            found[f"{moment} recovered {name} regeneration"] = after - after_cut
        found[f"{moment} regeneration gain"] = (
            found[f"{moment} plasticity with regeneration"]
            - found[f"{moment} plasticity without regeneration"]
        )
    for other in ("gradual", "rigl", "static"):
        found[f"granet over {other}"] = found["granet accuracy"] - found[f"{other} accuracy"]
    return found


CLAIM = Claim(
    card="170",
    method="granet",
    title="gradual pruning with regeneration beats gradual pruning, rewiring and static masks",
    model="a 64-256-256-10 perceptron from scratch, 98 % sparse (full: ResNet-20, 95 %); the "
    "plasticity study cuts 90 % at once",
    data="scikit-learn's digits: 1,200 to train for 40 epochs, 597 to test (full: CIFAR-10 for 15)",
    baseline="gradual magnitude pruning, RigL, static ERK; the cut without regeneration",
    metric="test accuracy, points",
    promises=(
        Promise("granet over gradual", "GraNet from half density above gradual pruning",
                negligible=0.5),
        Promise("granet over rigl", "GraNet above RigL", negligible=0.5),
        Promise("granet over static", "GraNet above static ERK", margin=1.0),
        Promise("late regeneration gain", "swapping weights after a late cut recovers more",
                negligible=0.5),
    ),
    measure=measure,
    looks=(3, 5, 8),
    version=2,
)  # fmt: skip
