"""Random static masks: how the gap to dense training falls with width, and ERK against uniform."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import (
    digits_subject,
    image_subject,
    loss_and_accuracy,
    perceptron,
)
from sparseworks.models.zoo import CifarResNet
from sparseworks.training.fitting import Recipe, fit_classifier

WIDTHS = {"quick": (16, 256), "full": (4, 8, 16)}


def _model(seed: int, width: int, setting: Setting) -> nn.Module:
    torch.manual_seed(seed)
    if setting == "quick":
        return perceptron(seed, 64, width, width, 10)
    return CifarResNet(3, width=width).to(memory_format=torch.channels_last)


@torch.no_grad()
def _multiplications(model: nn.Module, image: Tensor) -> float:
    """Products with a weight that is not zero, for one image."""
    counted = []

    def count(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        places = output.shape[2:].numel() if output.dim() == 4 else 1
        counted.append(int(torch.count_nonzero(module.weight)) * places)

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(count) for m in layers]
    model.eval()(image)
    for handle in handles:
        handle.remove()
    return float(sum(counted))


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    narrow, wide = WIDTHS[setting][0], WIDTHS[setting][-1]
    held: Callable[[nn.Module], float]
    if full:
        train, held = image_subject(seed, 20_000)
        recipe = Recipe(epochs=12)
    else:
        train, test = digits_subject(seed)
        recipe = Recipe(epochs=20, batch_size=50, lr=0.05, augment=False)

        def held(model: nn.Module) -> float:
            return loss_and_accuracy(model, test)[1]

    scored = train.batches(500, samples=500, seed=seed)
    found: dict[str, float] = {}
    for width in WIDTHS[setting]:
        cases: list[tuple[str, float, object]] = [("dense", 0.0, None)]
        for density in (0.3, 0.1) if full else (0.1, 0.05):
            cases.append((f"erk {density}", 1 - density, "erk"))
            if full or width == wide:
                cases.append((f"uniform {density}", 1 - density, "uniform"))
        if full and width == wide:
            snip = _model(seed, width, setting)
            result = sw.prune(
                snip, "snip", sparsity=0.9, data=scored, include="*",
                loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
            )  # fmt: skip
            cases.append(("snip ratios 0.1", 0.9, sw.by_masks(result.masks)))
        for case, sparsity, budget in cases:
            model = _model(seed, width, setting)

            def start(net, optimizer, steps, sparsity=sparsity, budget=budget):
                if budget is None:
                    return None
                return sw.sparsify(
                    net, optimizer, "static", sparsity=sparsity, budget=budget, seed=seed,
                    include="*",
                )  # fmt: skip

            fit_classifier(model, train, recipe, start=start, seed=seed)
            found[f"width {width} {case} accuracy"] = held(model)
            found[f"width {width} {case} multiplications"] = _multiplications(
                model, train.normalized(slice(0, 1))
            )

    def gap(width: int) -> float:
        return found[f"width {width} dense accuracy"] - found[f"width {width} erk 0.1 accuracy"]

    least = 0.1 if full else 0.05
    found["gap narrowest"], found["gap widest"] = gap(narrow), gap(wide)
    found["gap shrinks"] = gap(narrow) - gap(wide)
    found["gap halves"] = gap(narrow) - 2 * gap(wide)
    found["erk over uniform"] = (
        found[f"width {wide} erk {least} accuracy"]
        - found[f"width {wide} uniform {least} accuracy"]
    )
    return found


CLAIM = Claim(
    card="022",
    method="static",
    title="random masks approach dense training as the network grows wider; ERK beats uniform",
    model="64-w-w-10 perceptrons of widths 16 and 256 from scratch, 10 % of the weights (full: "
    "ResNet-20 of widths 4, 8, 16)",
    data="scikit-learn's digits: 1,200 to train for 20 epochs, 597 to test (full: 20,000 images of "
    "CIFAR-10 for 12 epochs, density 0.3, and the layer densities of SNIP)",
    baseline="dense training; uniform densities",
    metric="test accuracy, points",
    promises=(
        Promise("gap shrinks", "the gap dense - ERK of the widest below that of the narrowest"),
        Promise("gap halves", "the gap of the widest at most half of that of the narrowest"),
        Promise("erk over uniform", "ERK above uniform, widest, least density (5 %)", margin=0.5),
    ),
    measure=measure,
    looks=(3, 5, 8),
    version=2,
)
