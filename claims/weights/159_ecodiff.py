"""Gates trained on the end of the chain against norms, chance, and gates trained step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseworks.core.random import generator_for
from sparseworks.data.images import digits
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.models.zoo.diffusion import DDIM, TextToImage, fit_diffusion, words_to_tokens
from sparseworks.weights.structured.base import GroupScore
from sparseworks.weights.structured.ecodiff import EcoDiff, chain_gradients, hard_concrete
from sparseworks.weights.structured.slimming import slim

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = words_to_tokens(NAMES)
STEPS, BATCH = 10, 8
Chain = tuple[Tensor, Tensor]


def train(seed: int, steps: int) -> TextToImage:
    """Learn to draw the digits that words name."""
    torch.manual_seed(seed)
    model, data = TextToImage(), digits()
    tokens, g = WORDS[data.labels], generator_for(seed, "training")
    fit_diffusion(model, data.normalized(slice(None)), tokens, g, steps=steps)
    return model


def chains(seed: int, name: str, count: int, size: int) -> list[Chain]:
    g = generator_for(seed, name)
    return [
        (
            torch.randn(size, 1, 8, 8, generator=g),
            WORDS[torch.randint(10, (size,), generator=g)],
        )
        for _ in range(count)
    ]


class _Kept:
    """A saved tensor that counts itself while it lives."""

    bytes_, most = 0, 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        _Kept.bytes_ += self.size
        _Kept.most = max(_Kept.most, _Kept.bytes_)

    def __del__(self) -> None:
        _Kept.bytes_ -= self.size


def _saved(run: Callable[[], Any]) -> int:
    """Most bytes kept for backward passes while `run` runs."""
    _Kept.most = _Kept.bytes_
    begun = _Kept.bytes_
    with torch.autograd.graph.saved_tensors_hooks(_Kept, lambda kept: kept.tensor):
        run()
    return _Kept.most - begun


def _checks(model: TextToImage, seed: int) -> dict[str, float]:
    """Gradients of a gated chain: with one step in memory, and all at once."""
    noise, tokens = chains(seed, "checks", 1, 2)[0]
    logits = [torch.full((256,), 1.0, requires_grad=True) for _ in model.denoiser.blocks]

    def runs(steps: int) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
        sampler = DDIM(steps)

        def step(x: Tensor, i: int) -> Tensor:
            hooks = []
            for n, (block, logit) in enumerate(zip(model.denoiser.blocks, logits)):
                u = torch.rand(256, generator=generator_for(seed, str(n), i))
                z = hard_concrete(logit, u)
                hooks.append(block.fc2.register_forward_pre_hook(lambda m, a, z=z: a[0] * z))
            y = sampler.advance(x, sampler.predict(model, x, i, tokens), i)
            for hook in hooks:
                hook.remove()
            return y

        def full() -> list[Tensor]:
            x = noise
            for i in range(steps):
                x = step(x, i)
            return list(torch.autograd.grad(x.square().mean(), logits))

        def ours() -> list[Tensor]:
            return chain_gradients(step, noise, steps, lambda x: x.square().mean(), logits)[1]

        return ours, full

    model.requires_grad_(False)
    ours, full = runs(STEPS)
    a, b = torch.cat(ours()), torch.cat(full())
    short, long = (_saved(runs(n)[0]) for n in (5, 20))
    whole = _saved(runs(20)[1])
    model.requires_grad_(True)
    return {
        "gradient error": float((a - b).norm() / b.norm()),
        "memory of 20 steps over 5": long / short,
        "memory of full backpropagation over ours": whole / long,
    }


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    quick = setting == "quick"
    model = train(seed, 900 if quick else 6000)
    sampler = DDIM(STEPS)
    example = {"x": torch.randn(2, 1, 8, 8), "t": torch.full((2,), 0.5), "tokens": WORDS[:2]}
    some = chains(seed, "gates", 24, BATCH)
    noise, tokens = chains(seed, "test", 1, 128)[0]
    dense = sampler.sample(model, noise, tokens)
    gated = EcoDiff(sampler, epochs=6 if quick else 40, seed=seed)
    arms: dict[str, tuple[Any, Any]] = {
        "ecodiff": (gated, some),
        "per step": (replace(gated, objective="step"), some),
        "magnitude": ("group-norm", None),
        "random": ("group-random", None),
    }
    total = sum(p.numel() for p in model.parameters())
    units = sum(
        p.numel()
        for n, p in model.denoiser.blocks.named_parameters()
        if "attention" in n or ".fc" in n
    )
    found = _checks(model, seed)
    for name, (method, data) in arms.items():
        method = Once(method) if not isinstance(method, str) else method
        for percent in (20, 30, 40):
            made = slim(
                model, example, params=1 - percent / 100 * units / total, method=method, data=data,
                include="denoiser.blocks", copy=True, uniform=False,
            )  # fmt: skip
            error = F.mse_loss(sampler.sample(made.model, noise, tokens), dense)
            found[f"{name} {percent} %"] = float(error)
    for percent in (20, 30):
        ours = found[f"ecodiff {percent} %"]
        found[f"half of magnitude {percent}"] = math.log(
            0.5 * found[f"magnitude {percent} %"] / ours
        )
        found[f"below per step {percent}"] = math.log(found[f"per step {percent} %"] / ours)
    found["gradients equal"] = 1e-5 - found["gradient error"]
    found["memory flat"] = 1.1 - found["memory of 20 steps over 5"]
    return found


class Once(GroupScore):
    """Scores computed once, for several budgets of one model."""

    normalise = EcoDiff.normalise
    calibrates = False

    info = EcoDiff.info

    def __init__(self, method: EcoDiff) -> None:
        self.method, self.scores = method, None

    def score(self, *given: Any) -> Any:
        if self.scores is None:
            self.scores = self.method.score(*given)
        return self.scores


CLAIM = Claim(
    card="159",
    method="ecodiff",
    title="gates trained on the end of the chain keep a diffusion model's samples without training",
    model="a text-to-image diffusion transformer trained here (width 64, 3 blocks), 10 DDIM steps",
    data="scikit-learn's digits, named by their words",
    baseline="group norms, random groups, gates trained on single steps; the same parameters cut",
    metric="mean squared error of 128 samples to the dense model's, same noise and words",
    promises=(
        Promise("half of magnitude 20", "log of half magnitude's error over ours, 20 % of units"),
        Promise("half of magnitude 30", "log of half magnitude's error over ours, 30 % of units"),
        Promise("below per step 20", "log of the per-step gates' error over ours, 20 % of units"),
        Promise("below per step 30", "log of the per-step gates' error over ours, 30 % of units"),
        Promise("gradients equal", "step-by-step gradients equal full backpropagation to 1e-5"),
        Promise("memory flat", "memory of 20 steps at most 1.1 times that of 5"),
    ),
    measure=measure,
    looks=(3, 5),
    version=2,
)
