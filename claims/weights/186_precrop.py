"""PreCropping against the masks it takes its densities from, and against uniform widths."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.masks import attach, masks
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import image_subject
from sparseworks.models.coupling import trace
from sparseworks.models.zoo import resnet20
from sparseworks.training.fitting import Recipe, fit_classifier
from sparseworks.weights.structured import crop


def _fresh(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return resnet20()


def _shuffled(model: nn.Module, dense: nn.Module, seed: int) -> nn.Module:
    """The dense model with the mask of `model`, permuted inside every layer."""
    record = masks(model)
    assert record is not None
    generator = torch.Generator().manual_seed(seed)
    weights = dict(dense.named_parameters())
    for name in list(record):
        mask = record[name]
        order = torch.randperm(mask.numel(), generator=generator)
        mask = mask.flatten()[order].view(mask.shape)
        record = record.with_mask(name, mask, "unstructured")
        with torch.no_grad():
            weights[name].mul_(mask)
    attach(dense, record)
    return dense


def _step_times(models: Mapping[str, nn.Module], x: torch.Tensor) -> dict[str, float]:
    """Least CPU seconds of a training step of each, all in turn."""
    y = torch.arange(len(x)) % 10
    runs: dict[str, Callable[[], None]] = {}
    for name, given in models.items():
        model = copy.deepcopy(given).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        if masks(model) is not None:
            sw.sparsify(model, optimizer, "fixed")

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        runs[name] = step
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(6):
        for name, run in runs.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def _at(
    density: float, seed: int, full: bool, found: dict[str, float]
) -> dict[str, tuple[float, nn.Module]]:
    train, metric = image_subject(seed, 50_000 if full else 5000, size=32 if full else 16)
    recipe = Recipe(epochs=12 if full else 6, batch_size=64, lr=0.1)
    example = train.normalized(slice(0, 2))
    masked = _fresh(seed)
    sw.prune(masked, "synflow", sparsity=1 - density, data=[example])
    models = {
        "mask": masked,
        "shuffled": _shuffled(masked, _fresh(seed), seed),
        "crop": _fresh(seed),
        "uniform": _fresh(seed),
    }
    crop(models["crop"], example, params=density, densities="synflow")
    crop(models["uniform"], example, params=density, densities="uniform")
    trained = {}
    for name, model in models.items():
        model.to(memory_format=torch.channels_last)
        found[f"{name} MFLOP at {density}"] = trace(model, example).flops() / len(example) / 1e6
        begun = copy.deepcopy(model)

        def start(net, optimizer, steps):  # type: ignore[no-untyped-def]
            return None if masks(net) is None else sw.sparsify(net, optimizer, "fixed")

        fit_classifier(model, train, recipe, start=start, seed=seed)
        trained[name] = (float(metric(model)), begun)
        found[f"{name} at {density}"] = trained[name][0]
    return trained


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    found: dict[str, float] = {}
    trained = _at(0.3, seed, full, found)
    if full:
        _at(0.1, seed, full, found)
    value = {name: accuracy for name, (accuracy, _) in trained.items()}
    dense = _fresh(seed).to(memory_format=torch.channels_last)
    timed = {n: m for n, (_, m) in trained.items() if n in ("mask", "crop")}
    times = _step_times({"dense": dense, **timed}, torch.randn(64, 3, 32, 32))
    return {
        **found,
        "crop step share": times["crop"] / times["dense"],
        "mask step share": times["mask"] / times["dense"],
        "crop as good as the mask": value["crop"] - value["mask"] + 1.0,
        "shuffling does not matter": 1.0 - abs(value["shuffled"] - value["mask"]),
        "crop above uniform": value["crop"] - value["uniform"],
        "crop trains faster": 0.6 - times["crop"] / times["dense"],
        "masks do not": times["mask"] / times["dense"] - 0.9,
    }


CLAIM = Claim(
    card="186",
    method="precrop",
    title="cropping to the densities of a mask at initialisation trains as well, and faster",
    model="ResNet-20 from scratch, 30 % of the parameters",
    data="5,000 CIFAR-10 images averaged to 16 x 16, 6 epochs; 5,000 test images",
    baseline="the SynFlow mask, the same mask shuffled inside every layer, uniform widths",
    metric="test accuracy in percent; CPU time of a training step (batch 64, 32 x 32), least of 6",
    promises=(
        Promise("crop as good as the mask", "accuracy at most 1 point below the SynFlow mask's"),
        Promise("shuffling does not matter", "a mask shuffled inside layers stays within 1 point"),
        Promise("crop above uniform", "accuracy above uniform widths at equal parameters", 0.5),
        Promise("crop trains faster", "a step takes at most 0.6 of the dense one's time"),
        Promise("masks do not", "a masked step takes at least 0.9 of the dense one's time"),
    ),
    measure=measure,
)
