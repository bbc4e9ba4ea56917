"""MaskSparsity against pressing on every scale and against cutting at once, with one mask."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.data.images import ImageSet, read_images
from sparseworks.diagnostics.claims import Claim, Promise, Setting, data_root
from sparseworks.models.coupling import trace
from sparseworks.models.zoo.resnet import load_resnet
from sparseworks.weights.structured.mask_sparsity import MaskSparsity
from sparseworks.weights.structured.recovery import finetune
from sparseworks.weights.structured.scales import Keep, Scales, cut_folded, find_scales, press

INNER = ("bn1", "layer*.bn2")  # the residual streams stay whole
STRENGTH, WEAKER = 0.1, 5.0  # global pressing may also choose a weaker strength
BATCH = 64


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


def _kept_mean(scales: tuple[Scales, ...], keep: Keep) -> float:
    kept = [s.mean()[torch.as_tensor(keep[s.family.roots])] for s in scales]
    return float(torch.cat(kept).mean())


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    root = data_root()
    train = read_images(root / "cifar10" / "train.parquet", limit=None if full else 14_000)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held = ImageSet(train.pixels[order[:1000]], train.labels[order[:1000]])
    fit = ImageSet(train.pixels[order[1000:]], train.labels[order[1000:]])
    test = read_images(root / "cifar10" / "test.parquet", limit=None if full else 2000)
    on_test, on_held = _evaluate(test), _evaluate(held)
    dense = load_resnet(root / "models" / "resnet20-cifar10.safetensors")
    dense = dense.to(memory_format=torch.channels_last)
    example = _last(fit.normalized(slice(0, 2)))
    batches = _batches(fit, seed)
    calibration = [next(batches(0))]
    pressing: dict[str, Any] = {"epochs": 4 if full else 1, "steps_per_epoch": 200, "bf16": True}
    repairing: dict[str, Any] = {"epochs": 2 if full else 1, "steps_per_epoch": 80, "bf16": True}
    if full:
        pressing["steps_per_epoch"] = repairing["steps_per_epoch"] = len(fit) // BATCH

    method = MaskSparsity(keep=0.5, exclude=INNER)
    coupling = trace(dense, example)
    keep = method.mark(coupling, find_scales(dense, coupling, INNER))

    def pressed(strength: float, on: Keep | None) -> tuple[nn.Module, tuple[Scales, ...]]:
        model = copy.deepcopy(dense)
        scales = find_scales(model, coupling, INNER)
        finetune(model, batches, lr=0.02, penalty=lambda _: press(scales, strength, on), **pressing)
        return model, scales

    def finished(model: nn.Module) -> tuple[float, nn.Module]:
        """Accuracy at the cut, and the model after repair."""
        cut_folded(model, example, coupling, keep, calibration)
        at_cut = on_test(model)
        finetune(model, _batches(fit, seed + 50), lr=0.01, **repairing)
        return at_cut, model

    ours, scales = pressed(STRENGTH, ~keep)
    gap = _gap(scales, keep)
    found = {"kept scale": _kept_mean(scales, keep), "before the cut": on_test(ours)}
    found["at the cut"], ours = finished(ours)
    found["accuracy"] = on_test(ours)
    rivals = []
    for strength in (STRENGTH, STRENGTH / WEAKER):
        model, scales = pressed(strength, None)
        before, mean = on_test(model), _kept_mean(scales, keep)
        at_cut, model = finished(model)
        rivals.append((on_held(model), strength, before, at_cut, on_test(model), mean))
    _, chosen, _, rival_cut, rival, rival_mean = max(rivals)
    direct_cut, direct = finished(copy.deepcopy(dense))
    dense_accuracy = on_test(dense)
    drop = found["before the cut"] - found["at the cut"]
    return {
        **found,
        "dense accuracy": dense_accuracy,
        "global at the cut": rival_cut,
        "global accuracy": rival,
        "global strength": chosen,
        "direct at the cut": direct_cut,
        "direct accuracy": on_test(direct),
        "nearly lossless": 0.5 - drop,
        "direct loses more": dense_accuracy - direct_cut - drop,
        "two peaks": gap,
        "over global": found["accuracy"] - rival,
        "kept scales larger": found["kept scale"] - rival_mean,
    }


def _gap(scales: tuple[Scales, ...], keep: Keep) -> float:
    """log10 of the 5th percentile of kept scales over the largest marked one, above 1."""
    stays = [torch.as_tensor(keep[s.family.roots]) for s in scales]
    marked = torch.cat([s.largest()[~k] for s, k in zip(scales, stays)]).max()
    kept = torch.cat([s.mean()[k] for s, k in zip(scales, stays)]).quantile(0.05)
    return math.log10(float(kept) / max(float(marked), 1e-12)) - 1


CLAIM = Claim(
    card="013",
    method="mask-sparsity",
    title="pressing only on marked channels makes the cut nearly lossless and spares the others",
    model="ResNet-20, trained; half of the channels inside every block, smallest |gamma|",
    data="CIFAR-10: 13,000 training images, the first 2,000 test images",
    baseline="the same mask with every scale pressed on (s or s/5, chosen on 1,000 held-out "
    "training images), and cut at once; all with folding and the same fine-tuning",
    metric="test accuracy at the cut and after 80 steps of fine-tuning; |gamma|",
    promises=(
        Promise("nearly lossless", "the cut costs less than half a point of accuracy"),
        Promise("direct loses more", "cutting the dense model at once costs more (points)", 10.0),
        Promise("two peaks", "kept scales (5th percentile) over 10x the largest marked (log10)"),
        Promise("over global", "accuracy above that of pressing on every scale (points)", 0.3),
        Promise("kept scales larger", "mean |gamma| of kept channels above that of global press"),
    ),
    measure=measure,
)
