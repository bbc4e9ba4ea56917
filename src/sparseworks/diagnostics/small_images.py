"""What claims on N:M convolutions share: a small network on 16 x 16 images, and its training."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.data.images import ImageSet, read_images
from sparseworks.diagnostics.claims import data_root
from sparseworks.training.planning import Sparse

__all__ = ["fit_images", "small_images", "small_network"]


def small_images(seed: int, images: int, held: int = 4_000) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10 at 16 x 16: a random part of the first training images, a fifth more than it.

    Returns:
        (training images, the first test images)
    """
    root = data_root() / "cifar10"
    pool = _shrunk(root / "train.parquet", images + images // 5)
    test = _shrunk(root / "test.parquet", held)
    part = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:images]
    return ImageSet(pool.pixels[part], pool.labels[part]), test


@cache
def _shrunk(path: Path, limit: int) -> ImageSet:
    """Decoded once for all seeds."""
    read = read_images(path, limit=limit)
    pixels = F.adaptive_avg_pool2d(read.pixels.float(), 16).round().to(torch.uint8)
    return ImageSet(pixels, read.labels)


def small_network(classes: int = 10) -> nn.Module:
    """Four 3 x 3 convolutions of 16, 32, 64 and 128 channels, each with a batch norm.

    All but the first have inputs and outputs that 8 divides.
    """
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 1)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes)]
    return nn.Sequential(*layers)


def fit_images(
    model: nn.Module,
    images: ImageSet,
    *,
    steps: int,
    seed: int,
    lr: float = 0.1,
    batch: int = 64,
    sparse: Sparse | None = None,
    after: Callable[[int, Any], Any] | None = None,
) -> Any:
    """SGD with momentum 0.9 and a cosine to 0, on random batches that depend on the seed alone.

    Returns:
        The run, finished; None of a dense training.
    """

    def build(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4)

    if sparse is None:
        run, optimizer = None, build(model.parameters())
    else:
        run, optimizer = sparse.begin(model, steps, build)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(1, steps + 1):
        chosen = torch.randint(0, len(images), (batch,), generator=generator)
        x: Tensor = images.normalized(chosen).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), images.labels[chosen]))
        optimizer.step()
        schedule.step()
        if after is not None:
            after(step, run)
    if run is not None:
        run.finish()
    model.eval()
    return run
