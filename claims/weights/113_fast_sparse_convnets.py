"""The sparse product against dense and CSR, blocks of four, and a small separable network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.judging import LOOKS
from sparseworks.diagnostics.subjects import image_subject
from sparseworks.engine.measuring import least_seconds
from sparseworks.engine.programs import lone_product
from sparseworks.training.fitting import Recipe, fit_classifier

SHAPES = {
    "quick": ((256, 784), (512, 196)),
    "full": ((256, 3136), (256, 784), (512, 196), (1024, 49)),
}


def thinned(channels: int, sparsity: float, block: int, generator: torch.Generator) -> Tensor:
    keep = torch.rand(channels // block, channels, generator=generator) >= sparsity
    return torch.randn(channels, channels, generator=generator) * keep.repeat_interleave(block, 0)


def ours(weight: Tensor, x: Tensor) -> tuple[Callable[[], Any], Tensor]:
    """One 1 x 1 convolution as a program, from and to torch's layout."""
    made = lone_product(weight[:, :, None, None], "image", tuple(x.shape[2:]))
    y = torch.empty_like(x)
    return lambda: made.native.run([x, y], 1, 1), y


def kernels(setting: Setting, seed: int) -> dict[str, float]:
    """Worst ratios over the shapes, as logarithms of speed-ups."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {"error": 0.0}
    for channels, pixels in SHAPES[setting]:
        side = math.isqrt(pixels)
        x = torch.randn(1, channels, side, side, generator=generator)
        flat = x.view(channels, -1)
        for sparsity in (0.7, 0.8, 0.9, 0.95):
            weight = thinned(channels, sparsity, 1, generator)
            csr = weight.to_sparse_csr()
            runs: dict[str, Callable[[], Any]] = {}
            runs["ours"], y = ours(weight, x)
            runs["block 4"], _ = ours(thinned(channels, sparsity, 4, generator), x)
            runs["dense"] = lambda w=weight, x=x: F.conv2d(x, w[:, :, None, None])
            runs["csr"] = lambda m=csr, flat=flat: torch.sparse.mm(m, flat)
            seconds = least_seconds(runs, 40)
            wanted = F.conv2d(x.double(), weight.double()[:, :, None, None])
            error = float((y - wanted).abs().max() / wanted.abs().max())
            found["error"] = max(found["error"], error)
            for name, over in (("dense", "ours"), ("csr", "ours"), ("ours", "block 4")):
                key = f"{over} over {name} at {sparsity:.0%}"
                found[key] = min(found.get(key, math.inf), math.log(seconds[name] / seconds[over]))
    return found


class Separable(nn.Module):
    """Depthwise and 1 x 1 convolutions in turn."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
                                   nn.ReLU()]  # fmt: skip
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(a, a, 3, 1 + i % 2, 1, groups=a, bias=False), nn.BatchNorm2d(a),
                       nn.ReLU(), nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b),
                       nn.ReLU()]  # fmt: skip
        self.body, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).mean((2, 3)))
        return logits


def network(setting: Setting, seed: int) -> dict[str, float]:
    full = setting == "full"
    train, held = image_subject(seed, 20_000 if full else 3_000, size=8, held=2_000)
    recipe = Recipe(epochs=20 if full else 12, batch_size=64)
    found, models = {}, {}
    for case in ("dense", "sparse"):
        torch.manual_seed(seed)
        model = Separable().to(memory_format=torch.channels_last)

        def start(net, optimizer, steps, case=case):
            if case == "dense":
                return None
            return sw.sparsify(net, optimizer, "fast-sparse-convnets", sparsity=0.85, steps=steps,
                               include="*", every=10, seed=seed)  # fmt: skip

        fit_classifier(model, train, recipe, start=start, seed=seed)
        found[f"{case} accuracy"] = held(model)
        models[case] = model.to(memory_format=torch.contiguous_format)
    x = torch.randn(1, 3, 64, 64)
    runs = {n: sw.compile(m, x, threads=1) for n, m in models.items()}
    with torch.no_grad():
        seconds = least_seconds(
            {"sparse": lambda: runs["sparse"](x), "dense": lambda: runs["dense"](x),
             "torch": lambda: models["dense"](x)}, 60
        )  # fmt: skip
    found["small loss"] = found["sparse accuracy"] - found["dense accuracy"] + 1.0
    found["faster end to end"] = math.log(
        min(seconds["dense"], seconds["torch"]) / seconds["sparse"]
    )
    return found


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = kernels(setting, seed) | network(setting, seed)
    finally:
        torch.set_num_threads(threads)
    found["beats dense"] = min(found[f"ours over dense at {s}"] for s in ("90%", "95%"))
    found["beats csr"] = min(found[f"ours over csr at {s}"] for s in ("80%", "90%", "95%"))
    found["blocks beat single weights"] = found["block 4 over ours at 90%"]
    found["exact"] = 1e-5 - found["error"]
    return found


CLAIM = Claim(
    card="113",
    method="fast-sparse-convnets",
    title="sparse 1 x 1 convolutions are faster than dense ones at 90 %, at little loss",
    model="1 x 1 convolutions alone, and a separable network of five convolutions, 85 % sparse",
    data="random weights; CIFAR-10 at 8 x 8: 3,000 images for 12 epochs, 2,000 test images",
    baseline="torch's dense convolution and CSR product, one thread; the dense network",
    metric="logarithm of the speed-up, worst shape; test accuracy, points",
    promises=(
        Promise("exact", "relative error at most 1e-5"),
        Promise("beats dense", "faster than dense at 90 and 95 %"),
        Promise("beats csr", "faster than CSR at 80, 90 and 95 %"),
        Promise("blocks beat single weights", "blocks of four faster than single weights at 90 %"),
        Promise("small loss", "the sparse network loses at most one point"),
        Promise("faster end to end", "the sparse network is faster than the dense one"),
    ),
    measure=measure,
    looks=LOOKS,
    version=2,
)
