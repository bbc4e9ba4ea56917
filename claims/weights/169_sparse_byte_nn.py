"""Groups of outputs that share inputs: kernels against dense ones, and a permuted ResNet-20."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting, data_root
from sparseworks.diagnostics.subjects import image_subject
from sparseworks.engine.measuring import least_seconds
from sparseworks.engine.programs import lone_product
from sparseworks.models.coupling import trace
from sparseworks.models.views import find_prunable
from sparseworks.models.zoo import load_resnet
from sparseworks.training.recalibration import reestimate
from sparseworks.weights.semistructured.permuting import (
    Permutation,
    permutable,
    permute,
    places_of,
)
from sparseworks.weights.semistructured.rearranging import rearrange

SHAPES = ((256, 3136), (256, 784), (512, 196), (1024, 49))
LEVELS = ((0.3, 1.1), (0.5, 1.1), (0.8, 2.0))  # sparsity, speed-up over dense that is promised


def ours(weight: Tensor, x: Tensor) -> tuple[Callable[[], Any], Tensor, int]:
    """One 1 x 1 convolution as a program, from and to torch's layout; rows that share taps."""
    made = lone_product(weight[:, :, None, None], "image", tuple(x.shape[2:]))
    y = torch.empty_like(x)
    return lambda: made.native.run([x, y], 1, 1), y, next(iter(made.groups.values()))


def kernels(seed: int) -> dict[str, float]:
    """Logarithms of the worst speed-ups, less that of what is promised."""
    generator = torch.Generator().manual_seed(seed)
    found = {"error": 0.0, "rows that share taps": 4.0}
    for channels, pixels in SHAPES:
        side = math.isqrt(pixels)
        x = torch.randn(1, channels, side, side, generator=generator)
        weight = torch.randn(channels, channels, generator=generator)
        dense = weight[:, :, None, None]
        runs: dict[str, Callable[[], Any]] = {"torch": lambda w=dense, x=x: F.conv2d(x, w)}
        runs["our dense"] = ours(weight, x)[0]
        for size in (4, 8):
            for sparsity, _ in LEVELS:
                keep = torch.rand(channels // size, channels, generator=generator) >= sparsity
                thin = weight * keep.repeat_interleave(size, 0)
                run, y, shared = ours(thin, x)
                runs[f"{size} {sparsity}"] = run
                run()
                wanted = F.conv2d(x.double(), thin.double()[:, :, None, None])
                error = float((y - wanted).abs().max() / wanted.abs().max())
                found["error"] = max(found["error"], error)
                found["rows that share taps"] = min(found["rows that share taps"], shared)
        seconds = least_seconds(runs, 40)
        for size in (4, 8):
            for sparsity, promised in LEVELS:
                for name in ("torch", "our dense"):
                    ratio = math.log(seconds[name] / seconds[f"{size} {sparsity}"])
                    found[f"G={size} {sparsity:.0%} {name} {channels}x{pixels}"] = math.exp(ratio)
                    key = f"over {name} at {sparsity:.0%}"
                    found[key] = min(found.get(key, math.inf), ratio - math.log(promised))
    return found


def scrambled(model: nn.Module, example: Tensor, seed: int) -> None:
    """Put the channels in a random order: the one a network was trained with is arbitrary."""
    coupling, rng = trace(model, example), np.random.default_rng(seed)
    orders = [
        Permutation(places_of(coupling, f), rng.permutation(len(f))) for f in coupling.families
    ]
    permute(model, permutable(model, example, orders))


def share(model: nn.Module, dense: nn.Module) -> float:
    kept, all_ = (
        sum(float(v.matrix().abs().sum()) for v in find_prunable(m)) for m in (model, dense)
    )
    return 100 * kept / all_


def network(seed: int, setting: Setting) -> dict[str, float]:
    train, held = image_subject(seed, 1_000, held=10_000 if setting == "full" else 2_000)
    batches = train.batches(250)
    x = batches[0][0][:4]
    model = load_resnet(str(data_root() / "models" / "resnet20-cifar10.safetensors")).eval()
    scrambled(model, x, seed)
    arranged = copy.deepcopy(model)
    rearrange(arranged, x, sparsity=0.5, pattern="shared4")
    with torch.no_grad():
        before, after = model(x), arranged(x)
    found = {"change": float((after - before).abs().max() / before.abs().max())}
    cases: dict[str, dict[str, Any]] = {
        "permuted groups": {"method": "sparse-byte-nn", "pattern": "shared4", "data": [x]},
        "groups": {"method": "magnitude", "pattern": "shared4"},
        "single weights": {"method": "magnitude", "pattern": "unstructured"},
        "channels": {"method": "magnitude", "pattern": "rows"},
    }
    found["dense accuracy"] = held(model.to(memory_format=torch.channels_last))
    for name, options in cases.items():
        pruned = copy.deepcopy(model)
        sw.prune(pruned, sparsity=0.5, **options)
        found[f"{name}: retained"] = share(pruned, model)
        found[f"{name}: accuracy"] = held(pruned)
        reestimate(pruned, batches)
        found[f"{name}: accuracy, statistics anew"] = held(pruned)
    return found


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = kernels(seed) | network(seed, setting)
    finally:
        torch.set_num_threads(threads)
    found["exact kernel"] = 1e-5 - found["error"]
    found["same function"] = 1e-6 - found["change"]
    for what in ("retained", "accuracy", "accuracy, statistics anew"):
        permuted = found[f"permuted groups: {what}"]
        found[f"permutation: {what}"] = permuted - found[f"groups: {what}"]
        found[f"weights over groups: {what}"] = found[f"single weights: {what}"] - permuted
        found[f"groups over channels: {what}"] = permuted - found[f"channels: {what}"]
    return found


CLAIM = Claim(
    card="169",
    method="sparse-byte-nn",
    title="groups of outputs that share inputs are fast at 30 %; a permutation makes them better",
    model="1 x 1 convolutions of 256 to 1024 channels; a trained ResNet-20, half of its weights",
    data="random weights; CIFAR-10, 2,000 test images; channels put in random orders",
    baseline="torch's and our dense convolution, one thread; the same groups without permutation",
    metric="logarithm of speed-up over that promised, worst shape and G; test accuracy, points",
    promises=(
        Promise("exact kernel", "relative error at most 1e-5"),
        Promise("over torch at 30%", "1.1 times as fast as torch's dense one at 30 % zeros"),
        Promise("over torch at 50%", "1.1 times as fast as torch's dense one at 50 %"),
        Promise("over torch at 80%", "twice as fast as torch's dense one at 80 %"),
        Promise("over our dense at 30%", "1.1 times as fast as our dense one at 30 %"),
        Promise("over our dense at 50%", "1.1 times as fast as our dense one at 50 %"),
        Promise("over our dense at 80%", "twice as fast as our dense one at 80 %"),
        Promise("same function", "the permuted dense network differs by at most 1e-6"),
        Promise("permutation: retained", "the permutation retains more magnitude"),
        Promise("permutation: accuracy", "accuracy gained as pruned, nothing adjusted", margin=2.0),
        Promise("permutation: accuracy, statistics anew",
                "the same with batch-norm statistics estimated anew", margin=2.0),
        Promise("weights over groups: retained", "single weights retain more than groups"),
        Promise("groups over channels: retained", "groups retain more than channels"),
        Promise("weights over groups: accuracy", "single weights are more accurate than groups"),
        Promise("groups over channels: accuracy", "groups are more accurate than channels"),
    ),
    measure=measure,
    seeds=tuple(range(8)),
)  # fmt: skip
