"""Tickets from an early step against tickets from the initialisation, and why: stability.

Four epochs of 8 x 8 images leave the dense network itself at 22 to 29 % (tickets of either kind do
better, as they train longer in sum), so the quick setting can show the stability, whose distances
do not depend on a good network, and says little on accuracy; that takes the full setting.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

import torch

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import image_subject
from sparseworks.models.zoo import resnet20
from sparseworks.training.fitting import Recipe, fit_classifier


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    images, accuracy = image_subject(
        seed, 10_000 if full else 4_000, size=32 if full else 8, held=5_000 if full else 2_000
    )
    # no warm-up and a high rate from the first step: both would hide that rewinding is needed
    recipe = Recipe(
        epochs=8 if full else 4, batch_size=64, lr=0.1, weight_decay=1e-4, schedule="step"
    )

    def fit(model, **given):
        fit_classifier(model, images, recipe, **given)

    found: dict[str, float] = {}
    done = {}
    with tempfile.TemporaryDirectory() as folder:  # the dense training is shared
        for k in (0.0, 0.005, 0.02, 0.05) if full else (0.0, 0.05):
            torch.manual_seed(seed)
            model = resnet20().to(memory_format=torch.channels_last)
            run = done[k] = sw.experiment(
                fit, model, "rewinding", sparsity=0.875, rounds=3 if full else 2, rewind=k,
                stability=True, controls=k == 0.05, evaluate=accuracy, seed=seed,
                data=images.batches(200, samples=1_000), folder=folder, about={"seed": seed},
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
    model="ResNet-20 from scratch, 87.5 % sparse in 2 rounds",
    data="CIFAR-10 at 8 x 8: 4,000 images, 4 epochs, 2,000 test images (full: 32 x 32, 10,000, 8)",
    baseline="rewinding to step 0; the same masks on new values",
    metric="test accuracy, points; root mean square distance of final weights",
    promises=(
        Promise("late over original", "accuracy with k = 5 % above k = 0", margin=0.7),
        Promise("over new values", "accuracy above the same masks on new values", margin=1.0),
        Promise("closer to dense", "the ticket ends closer to the dense weights than with k = 0"),
        Promise("closer between orders", "two data orders end closer than with k = 0"),
        Promise("lower barrier", "error barrier between two data orders lower than with k = 0"),
    ),
    measure=measure,
)
