"""Tickets from an early step against tickets from the initialisation, and why: stability.

The quick setting trains a perceptron at a high rate, and to its end: a training that is cut short
says nothing on accuracy. 600 images are for training and 1,197 for testing, and up to 12 seeds:
with 597 test images the barrier between two data orders was lost in their noise.

The barrier's verdict is that of the first look, whose three values are alike by chance: over the 12
seeds that other promises took its mean is 0.04 points (-0.03 to 0.11), that is, open.
"""

from __future__ import annotations

import tempfile
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


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    # no warm-up and a high rate from the first step: the contrary would hide the need to rewind
    recipe = Recipe(
        epochs=8 if full else 40, batch_size=64 if full else 50, lr=0.1 if full else 0.2,
        weight_decay=1e-4, schedule="step", augment=full,
    )  # fmt: skip
    accuracy: Callable[[nn.Module], float]
    if full:
        images, accuracy = image_subject(seed, 10_000)
    else:
        images, held = digits_subject(seed, 600)

        def accuracy(model: nn.Module) -> float:
            return loss_and_accuracy(model, held)[1]

    def fit(model, **given):
        fit_classifier(model, images, recipe, **given)

    found: dict[str, float] = {}
    done = {}
    with tempfile.TemporaryDirectory() as folder:  # the dense training is shared
        for k in (0.0, 0.005, 0.02, 0.05) if full else (0.0, 0.05):
            torch.manual_seed(seed)
            model = resnet20().to(memory_format=torch.channels_last)
            if not full:
                model = perceptron(seed, 64, 256, 256, 10)
            run = done[k] = sw.experiment(
                fit, model, "rewinding", sparsity=0.875 if full else 0.98, rounds=3, rewind=k,
                stability=True, controls=k == 0.05, evaluate=accuracy, seed=seed,
                include=None if full else "*", data=images.batches(200, samples=1_000),
                folder=folder, about={"seed": seed},
            )  # fmt: skip
            assert run.result is not None
            found[f"accuracy, k = {k:.1%}"] = run.result.figures["score"]
            found |= {f"{name}, k = {k:.1%}": value for name, value in run.figures.items()}
    first, last = done[0.0], done[0.05]
    score = {name: r.figures["score"] for name, r in last.finished.items()}
    ticket = score[last.result.name]
    return {
        **found,
        "dense accuracy": score["dense"],
        "same masks, new values": score["same masks, new values"],
        "random masks, same values": score["random masks, same values"],
        "late over original": ticket - first.result.figures["score"],
        "over new values": ticket - score["same masks, new values"],
        "closer to dense": first.figures["distance to dense"] - last.figures["distance to dense"],
        "closer between orders": first.figures["distance between orders"]
        - last.figures["distance between orders"],
        "lower barrier": first.figures["barrier between orders"]
        - last.figures["barrier between orders"],
    }


CLAIM = Claim(
    card="139",
    method="rewinding",
    title="tickets rewound to an early step beat those rewound to the initialisation",
    model="a 64-256-256-10 perceptron from scratch, 98 % sparse in 3 rounds (full: ResNet-20, "
    "87.5 %)",
    data="scikit-learn's digits: 600 to train for 40 epochs, 1,197 to test (full: 10,000 images of "
    "CIFAR-10 for 8)",
    baseline="rewinding to step 0; the same masks on new values, from step k of the schedule",
    metric="test accuracy, points; root mean square distance of final weights",
    promises=(
        Promise("late over original", "accuracy with k = 5 % above k = 0", margin=0.7,
                negligible=0.25),
        Promise("over new values", "accuracy above the same masks on new values", margin=1.0),
        Promise("closer to dense", "the ticket ends closer to the dense weights than with k = 0"),
        Promise("closer between orders", "two data orders end closer than with k = 0"),
        Promise("lower barrier", "error barrier between two data orders lower than with k = 0",
                negligible=0.25),
    ),
    measure=measure,
    looks=LOOKS,
    version=3,
)  # fmt: skip
