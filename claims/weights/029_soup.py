"""Sparse soups against single prune-and-retrain, at equal and at triple training."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping

import torch

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import image_subject
from sparseworks.models.zoo import resnet20
from sparseworks.training.fitting import Recipe, fit_classifier

SPARSITY, COPIES = 0.9, 3


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    images, accuracy = image_subject(seed, 20_000 if full else 4_000, size=32 if full else 8)
    epochs = 3 if full else 2
    torch.manual_seed(seed)
    dense = resnet20().to(memory_format=torch.channels_last)
    fit_classifier(dense, images, Recipe(epochs=20 if full else 8, lr=0.1), seed=seed)

    with tempfile.TemporaryDirectory() as folder:

        def soup(copies: int, epochs: int):
            recipe = Recipe(epochs=epochs, lr=0.1, weight_decay=1e-4, schedule="linear")
            model = copy.deepcopy(dense)
            return sw.experiment(
                lambda net, **given: fit_classifier(net, images, recipe, **given),
                model, "soup", sparsity=SPARSITY, phases=2, copies=copies, evaluate=accuracy,
                data=images.batches(200, samples=len(images) // 5, seed=seed),
                seed=100 * seed, folder=folder, about={"seed": seed, "epochs": epochs},
            )  # fmt: skip

        ours, single, longer = soup(COPIES, epochs), soup(1, epochs), soup(1, COPIES * epochs)
        score = {n: r.figures["score"] for n, r in ours.finished.items()}
        apart = _pruned_apart(
            [ours.finished[f"phase 1, copy {j + 1}"].into(ours.fresh()) for j in range(COPIES)]
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


def _pruned_apart(models: list[torch.nn.Module]) -> float:
    """The sparsity of the mean of models that each choose their own masks."""
    union: dict[str, torch.Tensor] = {}
    for model in models:
        sw.attach(model, None)
        sw.prune(model, "magnitude", sparsity=SPARSITY, budget="global")
        for name, mask in sw.masks(model).items():
            union[name] = union.get(name, torch.zeros_like(mask)) | mask
    return 1 - sum(int(m.sum()) for m in union.values()) / sum(m.numel() for m in union.values())


CLAIM = Claim(
    card="029",
    method="soup",
    title="averaging retrained copies of one pruned model beats one copy, at no cost in use",
    model="ResNet-20 trained on the same images, 90 % sparse in 2 phases, 3 copies",
    data="CIFAR-10 at 8 x 8: 4,000 images, 2 epochs a phase, 5,000 test images"
    " (full: 32 x 32, 20,000, 3)",
    baseline="iterative magnitude pruning with one copy, for as long and three times as long",
    metric="test accuracy, points; share of zeros",
    promises=(
        Promise("over mean of copies", "soup above the mean of its copies", margin=0.5),
        Promise("over one copy", "soup above pruning and retraining one copy", margin=0.3),
        Promise("near triple training", "at most 0.2 points below one copy trained 3 times longer"),
        Promise(
            "sparser than apart", "sparser than the mean of models pruned each on its own",
            exact=True,
        ),
    ),
    measure=measure,
)  # fmt: skip
