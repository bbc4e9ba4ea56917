"""Masks that depend on sample and time over a frozen denoiser, and masks found for one chain.

8 seeds of half of these steps, of 8 chains and of 5 updates left gain, time and reward open: so
short a training hardly moved the masks. Now steps are as many as five CPU-minutes allow, in the
ratio of the full setting, updates are the paper's, and figures without a promise are measured on
the first 3 seeds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.data.images import digits
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.models.zoo import DDIM, UNet
from sparseworks.models.zoo.diffusion import diffusion_loss, fit_diffusion
from sparseworks.training.lora import LowRankUpdates
from sparseworks.weights.dynamic.mask_search import search_masks
from sparseworks.weights.dynamic.maskunet import layers_of

GRID, BATCH, CHAINS, LR = 10, 32, 64, 3e-3


def images() -> tuple[Tensor, Tensor, Tensor]:
    """Digits in [-1, 1] to train with, their labels, and those to test with."""
    found = digits()
    pixels = found.pixels.float() / 127.5 - 1
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return pixels[train], found.labels[train], pixels[test]


def noised(images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    a = torch.cos(t * torch.pi / 2).square().view(-1, 1, 1, 1)
    return a.sqrt() * images + (1 - a).sqrt() * noise


@torch.no_grad()
def errors(model: nn.Module, images: Tensor, seed: int) -> float:
    """Squared error of the noise, each image at four times that cover [0, 1)."""
    g = torch.Generator().manual_seed(70_000 + seed)
    noise, total = torch.randn(images.shape, generator=g), 0.0
    start = torch.arange(len(images)) / len(images)
    for k in range(4):
        t = (start + k / 4) % 1.0
        total += float(F.mse_loss(model.eval()(noised(images, t, noise), t), noise)) / 4
    return total


@torch.no_grad()
def grid(model: nn.Module, images: Tensor, seed: int) -> Tensor:
    """Masks of images under one noise at GRID times, bool `[times, samples, weights]`."""
    g = torch.Generator().manual_seed(80_000 + seed)
    noise, found = torch.randn(images.shape, generator=g), []
    for i in range(GRID):
        t = torch.full((len(images),), (i + 0.5) / GRID)
        model.eval()(noised(images, t, noise), t)
        masks = [layer.last.flatten(1) for layer in layers_of(model).values()]
        found.append(torch.cat(masks, 1))
    return torch.stack(found)


def tuned(model: nn.Module, parameters: list[nn.Parameter], train: Tensor, steps: int, lr: float,
          seed: int, job: object = None) -> None:  # fmt: skip
    """Train some parameters on the loss of the denoiser; all arms see the same batches."""
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    if job is not None:
        job.attach(optimizer)  # type: ignore[attr-defined]
    g = torch.Generator().manual_seed(1000 + seed)
    model.train()
    for _ in range(steps):
        x = train[torch.randint(len(train), (BATCH,), generator=g)]
        optimizer.zero_grad()
        torch.autograd.backward(diffusion_loss(model, x, torch.zeros(BATCH), g))
        optimizer.step()
    model.eval()


def base_model(train: Tensor, steps: int, seed: int) -> UNet:
    torch.manual_seed(seed)
    model = UNet()
    g = torch.Generator().manual_seed(seed)
    fit_diffusion(model, train, torch.zeros(len(train)), g, steps=steps, batch=BATCH)
    return model.eval()


def masked(base: UNet, train: Tensor, steps: int, seed: int) -> UNet:
    """The base with masks, trained."""
    model = copy.deepcopy(base)
    job = sw.transform(model, "maskunet", example=(train[:2], torch.zeros(2)), bias=3.0, seed=seed)
    added = [p for p in model.parameters() if p.requires_grad]
    tuned(model, added, train, steps, LR, seed, job)
    return model


def reader(train: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A classifier of digits, whose log-probability is the reward."""
    torch.manual_seed(500 + seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    g = torch.Generator().manual_seed(500 + seed)
    for _ in range(200):
        index = torch.randint(len(train), (64,), generator=g)
        noisy = train[index] + 0.2 * torch.randn(64, 1, 8, 8, generator=g)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(noisy), labels[index]))
        optimizer.step()
    return model.eval().requires_grad_(False)


def low_rank(
    base: UNet, names: list[str], train: Tensor, test: Tensor, steps: int, seed: int
) -> float:
    """The error with low-rank updates of the same matrices, trained as long."""
    low = copy.deepcopy(base).requires_grad_(False)
    layers = {n: m for n, m in low.named_modules() if f"{n}.weight" in names}
    updates = LowRankUpdates(layers, rank=8, alpha=8.0, dropout=0.0, seed=seed)
    handles = list(updates.handles())
    tuned(low, list(updates.parameters()), train, steps, 1e-3, seed)
    found = errors(low, test, seed)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def random_masks(base: UNet, names: list[str], sparsity: float, test: Tensor, seed: int) -> float:
    """The error with one drawn mask of that sparsity."""
    g, drawn = torch.Generator().manual_seed(100_000 + seed), copy.deepcopy(base)
    for name in names:
        weight = drawn.get_parameter(name)
        weight.mul_(torch.rand(weight.shape, generator=g) >= sparsity)
    return errors(drawn, test, seed)


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    base_steps, steps = (4000, 3000) if setting == "full" else (600, 450)
    train, labels, test = images()
    base = base_model(train, base_steps, seed)
    weights = {n: p.clone() for n, p in base.state_dict().items()}
    found = {"frozen": errors(base, test, seed)}

    model = masked(base, train, steps, seed)
    found["masks"] = errors(model, test, seed)
    found["below frozen"] = found["frozen"] - found["masks"]
    moved = sum(int((model.state_dict()[n] != w).sum()) for n, w in weights.items())
    found["weights at rest"] = 0.5 - moved
    masks = grid(model, test[:48], seed)
    found["sparsity"] = 1 - float(masks.float().mean())
    found["some are masked"] = found["sparsity"]
    near = float((masks[1:] ^ masks[:-1]).float().mean())
    far = float((masks[0] ^ masks[-1]).float().mean())
    between = float((masks[:, 1:] ^ masks[:, :-1]).float().mean())
    found |= {"neighbours": near, "early to late": far, "between samples": between}
    found["masks follow the time"] = far - 2 * near

    names = list(layers_of(model))
    if seed < 3:
        found["low-rank updates"] = low_rank(base, names, train, test, steps, seed)
        found["random masks"] = random_masks(base, names, found["sparsity"], test, seed)

    judge = reader(train, labels, seed)
    g = torch.Generator().manual_seed(90_000 + seed)
    noise = torch.randn(CHAINS, 1, 8, 8, generator=g)
    wanted = torch.randint(10, (CHAINS,), generator=g)

    def reward(x: Tensor) -> Tensor:
        return F.log_softmax(judge(x), 1).gather(1, wanted[:, None])[:, 0]

    sampler = DDIM(steps=8)
    with torch.no_grad():
        before = float(reward(sampler.sample(base, noise, torch.zeros(CHAINS))).mean())
    searched = search_masks(
        base, noise, torch.zeros(CHAINS), reward, sampler, names, iterations=(1, 10), few=4,
        target=0.0, seed=seed,
    )  # fmt: skip
    with torch.no_grad():
        found |= {"reward": before, "reward searched": float(reward(searched.images).mean())}
    found["reward rises"] = found["reward searched"] - before
    return found


CLAIM = Claim(
    card="156",
    method="maskunet",
    title="masks that depend on sample and time improve a frozen denoiser; masks found for a "
    "chain raise its reward",
    model="U-Net of two levels (16 and 32 channels), attention on the way up, whose q, k, v, out "
    "are masked; 8 steps of DDIM",
    data="sklearn digits: 1,400 to train, 397 to test; 600 steps for the denoiser, then frozen, "
    "450 for the masks (full: 4,000 and 3,000), batches of 32",
    baseline="the frozen denoiser; beside it low-rank updates of rank 8 and random masks",
    metric="squared error of the noise on test images; share of masks that differ; mean "
    "log-probability of the wanted digit over 64 chains",
    promises=(
        Promise("below frozen", "error with masks below that of the frozen denoiser"),
        Promise("some are masked", "some weights are masked"),
        Promise("masks follow the time", "first to last time differ by more than twice neighbours"),
        Promise("weights at rest", "no weight of the denoiser has changed", exact=True),
        Promise("reward rises", "reward with searched masks above that without"),
    ),
    measure=measure,
    looks=(3, 5, 8),
    version=2,
)
