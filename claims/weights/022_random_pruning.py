"""Random static masks: how the gap to dense training falls with width, and ERK against uniform."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import image_subject
from sparseworks.models.zoo import CifarResNet
from sparseworks.training.fitting import Recipe, fit_classifier

NARROW, MIDDLE, WIDE = 4, 8, 16


def _model(seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    return CifarResNet(3, width=width).to(memory_format=torch.channels_last)


@torch.no_grad()
def _multiplications(model: nn.Module, size: int) -> float:
    """Products with a weight that is not zero, for one image."""
    counted = []

    def count(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        places = output.shape[2:].numel() if output.dim() == 4 else 1
        counted.append(int(torch.count_nonzero(module.weight)) * places)

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(count) for m in layers]
    model.eval()(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return float(sum(counted))


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    size = 32 if full else 16
    train, held = image_subject(seed, 20_000 if full else 4_000, size=size)
    recipe = Recipe(epochs=12 if full else 5, batch_size=128 if full else 64)
    scored = train.batches(500, samples=500, seed=seed)
    found: dict[str, float] = {}
    for width in (NARROW, MIDDLE, WIDE) if full else (NARROW, WIDE):
        cases: list[tuple[str, float, object]] = [("dense", 0.0, None)]
        for density in (0.3, 0.1) if full else (0.1,):
            cases.append((f"erk {density}", 1 - density, "erk"))
            if full or width == WIDE:
                cases.append((f"uniform {density}", 1 - density, "uniform"))
        if full and width == WIDE:
            snip = _model(seed, width)
            result = sw.prune(
                snip, "snip", sparsity=0.9, data=scored, include="*",
                loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
            )  # fmt: skip
            cases.append(("snip ratios 0.1", 0.9, sw.by_masks(result.masks)))
        for case, sparsity, budget in cases:
            model = _model(seed, width)

            def start(net, optimizer, steps, sparsity=sparsity, budget=budget):
                if budget is None:
                    return None
                return sw.sparsify(
                    net, optimizer, "static", sparsity=sparsity, budget=budget, seed=seed,
                    include="*",
                )  # fmt: skip

            fit_classifier(model, train, recipe, start=start, seed=seed)
            found[f"width {width} {case} accuracy"] = held(model)
            found[f"width {width} {case} multiplications"] = _multiplications(model, size)

    def gap(width: int) -> float:
        return found[f"width {width} dense accuracy"] - found[f"width {width} erk 0.1 accuracy"]

    found["gap narrowest"], found["gap widest"] = gap(NARROW), gap(WIDE)
    found["gap shrinks"] = gap(NARROW) - gap(WIDE)
    found["gap halves"] = gap(NARROW) - 2 * gap(WIDE)
    found["erk over uniform"] = (
        found[f"width {WIDE} erk 0.1 accuracy"] - found[f"width {WIDE} uniform 0.1 accuracy"]
    )
    return found


CLAIM = Claim(
    card="022",
    method="static",
    title="random masks approach dense training as the network grows wider; ERK beats uniform",
    model="ResNet-20 of widths 4 and 16 from scratch, 10 % of the weights (full: and 8)",
    data="CIFAR-10 at 16 x 16: 4,000 training images for 5 epochs, 5,000 test images (full: 20,000 "
    "at 32 x 32 for 12 epochs, density 0.3, and the layer densities of SNIP)",
    baseline="dense training; uniform densities",
    metric="test accuracy, points",
    promises=(
        Promise("gap shrinks", "the gap dense - ERK at width 16 below that at width 4"),
        Promise("gap halves", "the gap at width 16 at most half of that at width 4"),
        Promise("erk over uniform", "ERK above uniform at width 16", margin=0.5),
    ),
    measure=measure,
)
