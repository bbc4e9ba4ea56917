"""Sparse soups against single prune-and-retrain, at equal and at triple training.

The quick setting prunes a small network and trains it to its end, on up to 32 seeds: 3 seeds of a
ResNet-20 for 2 epochs a phase decided nothing, 12 of these left triple training open.
"""

from __future__ import annotations

import copy
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

COPIES = 3


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    accuracy: Callable[[nn.Module], float]
    torch.manual_seed(seed)
    if full:
        images, accuracy = image_subject(seed, 20_000)
        sparsity, epochs, options = 0.9, 3, {"lr": 0.1}
        dense: nn.Module = resnet20().to(memory_format=torch.channels_last)
    else:
        images, held = digits_subject(seed, 600)
        sparsity, epochs, options = 0.97, 10, {"lr": 0.05, "batch_size": 50, "augment": False}
        dense = perceptron(seed, 64, 256, 256, 10)

        def accuracy(model: nn.Module) -> float:
            return loss_and_accuracy(model, held)[1]

    fit_classifier(dense, images, Recipe(epochs=20, **options), seed=seed)

    with tempfile.TemporaryDirectory() as folder:

        def soup(copies: int, epochs: int):
            recipe = Recipe(epochs=epochs, weight_decay=1e-4, schedule="linear", **options)
            model = copy.deepcopy(dense)
            return sw.experiment(
                lambda net, **given: fit_classifier(net, images, recipe, **given),
                model, "soup", sparsity=sparsity, phases=2, copies=copies, evaluate=accuracy,
                data=images.batches(200, samples=len(images) // 5, seed=seed),
                seed=100 * seed, folder=folder, about={"seed": seed, "epochs": epochs},
            )  # fmt: skip

        ours, single, longer = soup(COPIES, epochs), soup(1, epochs), soup(1, COPIES * epochs)
        score = {n: r.figures["score"] for n, r in ours.finished.items()}
        apart = _pruned_apart(
            [ours.finished[f"phase 1, copy {j + 1}"].into(ours.fresh()) for j in range(COPIES)],
            sparsity,
        )
    candidates = [v for n, v in score.items() if n.startswith("phase 2, copy")]
    mixed = score["phase 2"]
    return {
        "dense accuracy": accuracy(dense),
        "soup accuracy": mixed,
        "best copy": max(candidates),
        "first soup over its copies": score["phase 1"]
        - sum(v for n, v in score.items() if n.startswith("phase 1, copy")) / COPIES,
        "over mean of copies": mixed - sum(candidates) / COPIES,
        "over one copy": mixed - single.result.figures["score"],
        "near triple training": mixed - longer.result.figures["score"] + 0.2,
        "sparser than apart": ours.result.figures["sparsity"] - apart,
        "sparsity of models pruned apart": apart,
    }


def _pruned_apart(models: list[nn.Module], sparsity: float) -> float:
    """The sparsity of the mean of models that each choose their own masks."""
    union: dict[str, torch.Tensor] = {}
    for model in models:
        sw.attach(model, None)
        sw.prune(model, "magnitude", sparsity=sparsity, budget="global")
        for name, mask in sw.masks(model).items():
            union[name] = union.get(name, torch.zeros_like(mask)) | mask
    return 1 - sum(int(m.sum()) for m in union.values()) / sum(m.numel() for m in union.values())


CLAIM = Claim(
    card="029",
    method="soup",
    title="averaging retrained copies of one pruned model beats one copy, at no cost in use",
    model="a trained 64-256-256-10 perceptron, 97 % sparse in 2 phases, 3 copies (full: "
    "ResNet-20, 90 %)",
    data="scikit-learn's digits: 600 to train, 10 epochs a phase, 1,197 to test (full: 20,000 "
    "images of CIFAR-10, 3 epochs)",
    baseline="iterative magnitude pruning with one copy, for as long and three times as long",
    metric="test accuracy, points; share of zeros",
    promises=(
        Promise("over mean of copies", "soup above the mean of its copies", margin=0.5,
                negligible=0.25),
        Promise("over one copy", "soup above pruning and retraining one copy", margin=0.3,
                negligible=0.25),
        Promise("near triple training", "at most 0.2 points below one copy trained 3 times longer"),
        Promise(
            "sparser than apart", "sparser than the mean of models pruned each on its own",
            exact=True,
        ),
    ),
    measure=measure,
    looks=(*LOOKS, 20, 32),
    version=2,
)  # fmt: skip
