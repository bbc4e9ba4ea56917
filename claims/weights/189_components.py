"""A sparsity for each part of a text-to-image model, against one for all; norms against inputs.

Up to 8 seeds: 3 left magnitude against Wanda open.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.random import generator_for
from sparseworks.data.images import digits
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.models.views import find_prunable
from sparseworks.models.zoo.diffusion import DDIM, TextToImage, fit_diffusion, words_to_tokens
from sparseworks.weights.oneshot.components import Components
from sparseworks.weights.oneshot.prune import prune

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = words_to_tokens(NAMES)
PARTS = {"encoder": "encoder", "denoiser": "denoiser"}
STEP, MOST = 0.05, 0.85


def _train(seed: int, steps: int) -> tuple[TextToImage, nn.Module]:
    """The model, and a classifier of digits that judges what it draws."""
    torch.manual_seed(seed)
    model, data = TextToImage(), digits()
    judge = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    images, labels = data.normalized(slice(None)), data.labels
    g = generator_for(seed, "training")
    learns = torch.optim.AdamW(judge.parameters(), 3e-3)
    for _ in range(600):
        index = torch.randint(len(images), (64,), generator=g)
        noisy = images[index] + 0.3 * torch.randn(64, 1, 8, 8, generator=g)
        loss = F.cross_entropy(judge(noisy), labels[index])
        learns.zero_grad()
        loss.backward()
        learns.step()
    fit_diffusion(model, images, WORDS[labels], g, steps=steps)
    return model, judge.eval()


class Quality:
    """Samples of one noise, compared with the dense model's; higher is better."""

    def __init__(self, dense: TextToImage, judge: nn.Module, seed: int) -> None:
        self.noise = torch.randn(100, 1, 8, 8, generator=generator_for(seed, "test"))
        self.labels = torch.arange(100) % 10
        self.sampler, self.judge = DDIM(10), judge
        self.expected = self._draw(dense)

    def _draw(self, model: nn.Module) -> Tensor:
        return self.sampler.sample(model, self.noise, WORDS[self.labels])

    def __call__(self, model: nn.Module) -> float:
        """Minus the mean squared error over the variance of the dense samples."""
        error = F.mse_loss(self._draw(model), self.expected) / self.expected.var()
        return -min(2.0, float(error)) if bool(error.isfinite()) else -2.0

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Percent of drawings that the judge reads as the word."""
        return float((self.judge(self._draw(model)).argmax(1) == self.labels).float().mean()) * 100


def _calibration(seed: int) -> list[dict[str, Tensor]]:
    """Noisy digits at all times, with their words."""
    data, g = digits(), generator_for(seed, "calibration")
    index = torch.randperm(len(data), generator=g)[:256]
    x, t = data.normalized(index), torch.rand(256, generator=g)
    a = torch.cos(t * math.pi / 2).square().view(-1, 1, 1, 1)
    x = a.sqrt() * x + (1 - a).sqrt() * torch.randn(x.shape, generator=g)
    return [{"x": x, "t": t, "tokens": WORDS[data.labels[index]]}]


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    model, judge = _train(seed, 900 if setting == "quick" else 6000)
    quality, least = Quality(model, judge, seed), -0.05
    chosen = copy.deepcopy(model)
    found = Components(step=STEP, most=MOST).search(chosen, PARTS, quality, least=least)
    cliffs = [c.cliff for c in found.curves.values()]

    sizes = {
        n: sum(v.parameter.numel() for v in find_prunable(model, p).views) for n, p in PARTS.items()
    }
    uniform, uniform_quality = 0.0, 0.0
    for k in range(1, round(MOST / STEP) + 1):
        trial = prune(model, "magnitude", sparsity=k * STEP, include=list(PARTS), copy=True).model
        if (q := quality(trial)) < least:
            break
        uniform, uniform_quality = k * STEP, q

    def at(method: Any, data: Any) -> float:
        trial = copy.deepcopy(model)
        for name, share in found.sparsity.items():
            if share > 0:
                prune(trial, method, sparsity=share, include=PARTS[name], data=data)
        return quality(trial)

    wanda = at("wanda", _calibration(seed))
    return {
        "cliffs differ": abs(cliffs[0] - cliffs[1]) - 0.10,
        "removes more": found.overall - 1.10 * uniform,
        "steep": math.log(max(c.steepness for c in found.curves.values()) / 5.0),
        "magnitude over Wanda": found.quality - wanda,
        "encoder cliff": found.curves["encoder"].cliff,
        "denoiser cliff": found.curves["denoiser"].cliff,
        "encoder share of weights": sizes["encoder"] / sum(sizes.values()),
        "encoder sparsity": found.sparsity["encoder"],
        "denoiser sparsity": found.sparsity["denoiser"],
        "overall sparsity": found.overall,
        "uniform sparsity": uniform,
        "quality": found.quality,
        "uniform quality": uniform_quality,
        "Wanda quality": wanda,
        "encoder steepness": found.curves["encoder"].steepness,
        "denoiser steepness": found.curves["denoiser"].steepness,
        "dense accuracy": quality.accuracy(model),
        "accuracy": quality.accuracy(chosen),
    }


CLAIM = Claim(
    card="189",
    method="components",
    title="parts of a text-to-image model bear different sparsities; their own ones remove more",
    model="a text encoder and a diffusion transformer trained here (width 64), 10 DDIM steps",
    data="scikit-learn's digits, named by their words",
    baseline="one sparsity for all parts, in steps of 5 points; Wanda at the same sparsities",
    metric="squared error of 100 samples to the dense model's, over their variance; 0.05 allowed",
    promises=(
        Promise("cliffs differ", "cliffs of the parts differ by at least 10 points of sparsity"),
        Promise("removes more", "zeros above 1.1 times those of one sparsity, equal quality"),
        Promise("steep", "log of the steepest fall over 5 times the usual change before it"),
        Promise("magnitude over Wanda", "quality of magnitude above Wanda's"),
    ),
    measure=measure,
    looks=(3, 5, 8),
)
