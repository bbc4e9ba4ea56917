"""Group percentiles, a falling penalty and attention distillation, each against going without."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.data.images import ImageSet, read_images
from sparseworks.diagnostics.claims import Claim, Promise, Setting, data_root
from sparseworks.models.coupling import trace
from sparseworks.models.zoo.resnet import load_resnet
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
SHARE, BATCH = 0.8, 64  # at 0.6 both arms are near chance right after the cut


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _batches(images: ImageSet, seed: int) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(100 * seed + number)
        for x, y in images.epoch(BATCH, generator):
            yield _last(x), y

    return epoch


def _evaluate(images: ImageSet) -> Callable[[nn.Module], float]:
    batches = [(_last(x), y) for x, y in images.batches(250)]

    @torch.no_grad()
    def measured(model: nn.Module) -> float:
        model.eval()
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
        return 100 * right / len(images)

    return measured


def _small(scales: tuple[Scales, ...]) -> float:
    """Share of scales below 0.01."""
    values = torch.cat([s.mean() for s in scales])
    return float((values < 1e-2).double().mean())


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    root = data_root()
    train = read_images(root / "cifar10" / "train.parquet", limit=None if full else 10_600)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held = ImageSet(train.pixels[order[:600]], train.labels[order[:600]])
    fit = ImageSet(train.pixels[order[600:]], train.labels[order[600:]])
    test = read_images(root / "cifar10" / "test.parquet", limit=None if full else 2000)
    on_test, on_held = _evaluate(test), _evaluate(held)
    dense = load_resnet(root / "models" / "resnet20-cifar10.safetensors")
    dense = dense.to(memory_format=torch.channels_last)
    example = _last(fit.normalized(slice(0, 2)))
    batches = _batches(fit, seed)
    calibration = [next(batches(0))]
    steps: dict[str, Any] = {"steps_per_epoch": len(fit) // BATCH if full else 120, "bf16": True}
    epochs = 3 if full else 1
    coupling = trace(dense, example)
    whole = coupling.parameters()

    def pressed(schedule: Any) -> tuple[nn.Module, tuple[Scales, ...]]:
        model = copy.deepcopy(dense)
        scales = find_scales(model, coupling, INNER)
        GroupDistillation(strength=0.02, schedule=schedule).sparse(
            model, scales, batches, epochs=epochs, lr=0.02, **steps
        )
        return model, scales

    def cut(model: nn.Module, keep: Keep) -> nn.Module:
        smaller = copy.deepcopy(model)
        cut_folded(smaller, example, coupling, keep, calibration)
        return smaller

    def staged(curves: list[Any], scales: tuple[Scales, ...]) -> Keep:
        choose = functools.partial(group_keep, coupling, scales, STAGES)
        found = percentiles_by_loss(curves, choose, coupling.parameters, SHARE * whole)
        percentiles.append(found)
        return choose(found)

    model, scales = pressed("half")
    constant, constant_scales = pressed("constant")
    percentiles: list[tuple[float, ...]] = []
    curves = loss_curves(model, example, coupling, scales, STAGES, on_held, GRID, calibration)
    choose = functools.partial(group_keep, coupling, scales, ("*",))
    single = choose(percentiles_for((1.0,), choose, coupling.parameters, SHARE * whole))
    ours = cut(model, staged(curves, scales))
    at_cut, single_cut = on_test(ours), on_test(cut(model, single))
    constant_cut = on_test(cut(constant, staged(curves, constant_scales)))

    repaired = {}
    for name, feature in (("plain", 0.0), ("attention", 0.05)):
        student = copy.deepcopy(ours)
        method = GroupDistillation(groups=STAGES, feature=feature, classes=0.0)
        method.distil(student, dense, _batches(fit, seed + 50), epochs=epochs, lr=0.01, **steps)
        repaired[name] = on_test(student)
    return {
        "dense accuracy": on_test(dense),
        "sparse accuracy": on_test(model),
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
    model="ResNet-20, trained; channels inside blocks, 80 % of the parameters stay",
    data="CIFAR-10: 10,000 training images, 600 for the sensitivity, the first 2,000 test images",
    baseline="one threshold for all stages, as many parameters; constant strength; fine-tuning "
    "without a teacher",
    metric="test accuracy in percent, at the cut and after 120 steps",
    promises=(
        Promise("groups over single", "accuracy at the cut above one threshold's (points)", 0.5),
        Promise("attention over plain", "accuracy above plain fine-tuning's (points)", 0.3),
        Promise("falling over constant", "accuracy at the cut above constant strength's (points)"),
    ),
    measure=measure,
    version=2,
)
