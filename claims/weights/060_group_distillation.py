"""Group percentiles, a falling penalty and attention distillation, each against going without.

Up to 12 seeds, and 0.05 nats as the least that counts at the cut: 8 left the groups open.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparseworks.data.images import ImageSet
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.judging import LOOKS
from sparseworks.diagnostics.metrics import accuracy
from sparseworks.diagnostics.subjects import loss_and_accuracy, seeded_epochs, trained_resnet
from sparseworks.models.coupling import trace
from sparseworks.weights.structured.group_distillation import GroupDistillation
from sparseworks.weights.structured.percentiles import (
    group_keep,
    loss_curves,
    percentiles_by_loss,
    percentiles_for,
)
from sparseworks.weights.structured.scales import Keep, Scales, cut_folded, find_scales

STAGES, INNER = ("layer1", "layer2", "layer3"), ("bn1", "layer*.bn2")
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)  # percentiles at which a stage is cut alone
SHARES, BATCH = {"quick": 0.6, "full": 0.8}, 50  # of the parameters


def _small(scales: tuple[Scales, ...]) -> float:
    """Share of scales below 0.01."""
    values = torch.cat([s.mean() for s in scales])
    return float((values < 1e-2).double().mean())


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full, share = setting == "full", SHARES[setting]
    dense, train, test = trained_resnet(seed, setting)
    aside = 600 if full else 200
    held, fit = (
        ImageSet(train.pixels[i], train.labels[i]) for i in (slice(aside), slice(aside, None))
    )
    on_held = accuracy(held.batches(500))
    example = fit.normalized(slice(0, 2))

    def on_test(model: nn.Module) -> float:
        """Minus the loss: less noisy than accuracy."""
        return -loss_and_accuracy(model, test)[0]

    batches = seeded_epochs(fit, BATCH, seed, augment=full)
    calibration = [next(batches(0))]
    steps: dict[str, Any] = {"steps_per_epoch": len(fit) // BATCH}
    epochs = 3 if full else 6
    coupling = trace(dense, example)
    whole = coupling.parameters()

    def pressed(schedule: Any) -> tuple[nn.Module, tuple[Scales, ...]]:
        model = copy.deepcopy(dense)
        scales = find_scales(model, coupling, INNER)
        GroupDistillation(strength=0.1, schedule=schedule).sparse(
            model, scales, batches, epochs=epochs, lr=0.02, **steps
        )
        return model, scales

    def cut(model: nn.Module, keep: Keep) -> nn.Module:
        smaller = copy.deepcopy(model)
        cut_folded(smaller, example, coupling, keep, calibration)
        return smaller

    def staged(curves: list[Any], scales: tuple[Scales, ...]) -> Keep:
        choose = functools.partial(group_keep, coupling, scales, STAGES)
        found = percentiles_by_loss(curves, choose, coupling.parameters, share * whole)
        percentiles.append(found)
        return choose(found)

    model, scales = pressed("half")
    constant, constant_scales = pressed("constant")
    percentiles: list[tuple[float, ...]] = []
    curves = loss_curves(model, example, coupling, scales, STAGES, on_held, GRID, calibration)
    choose = functools.partial(group_keep, coupling, scales, ("*",))
    single = choose(percentiles_for((1.0,), choose, coupling.parameters, share * whole))
    ours = cut(model, staged(curves, scales))
    at_cut, single_cut = on_test(ours), on_test(cut(model, single))
    constant_cut = on_test(cut(constant, staged(curves, constant_scales)))

    repaired = {}
    for name, feature in (("plain", 0.0), ("attention", 0.05)):
        student = copy.deepcopy(ours)
        method = GroupDistillation(groups=STAGES, feature=feature, classes=0.0)
        method.distil(
            student,
            dense,
            seeded_epochs(fit, BATCH, seed + 50, augment=full),
            epochs=epochs,
            lr=0.01,
            **steps,
        )
        repaired[name] = on_test(student)
    return {
        "dense score": on_test(dense),
        "sparse score": on_test(model),
        **{f"percentile of {s}": p for s, p in zip(STAGES, percentiles[0])},
        "at the cut": at_cut,
        "single threshold at the cut": single_cut,
        "constant strength at the cut": constant_cut,
        "share of small scales": _small(scales),
        "share of small scales, constant": _small(constant_scales),
        "fine-tuned": repaired["plain"],
        "distilled": repaired["attention"],
        "groups over single": at_cut - single_cut,
        "attention over plain": repaired["attention"] - repaired["plain"],
        "falling over constant": at_cut - constant_cut,
    }


CLAIM = Claim(
    card="060",
    method="group-distillation",
    title="a threshold per stage, a falling penalty and attention distillation each help",
    model="ResNet-8 (full: 20), trained; channels inside blocks, 60 % (full: "
    "80 %) of the parameters",
    data="scikit-learn's digits as RGB images: 800 to train for 6 epochs a phase, 200 for the "
    "sensitivity, 797 to test (full: CIFAR-10, 3 epochs)",
    baseline="one threshold for all stages, as many parameters; constant strength; fine-tuning "
    "without a teacher",
    metric="minus the test loss in nats, at the cut and after fine-tuning",
    promises=(
        Promise("groups over single", "loss at the cut below one threshold's (nats)",
                negligible=0.05),
        Promise("attention over plain", "loss below plain fine-tuning's (nats)", negligible=0.01),
        Promise("falling over constant", "loss at the cut below constant strength's (nats)"),
    ),
    measure=measure,
    looks=LOOKS,
    version=3,
)  # fmt: skip
