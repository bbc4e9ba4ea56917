"""A denoiser for each part of the time against one trained longer; experts of random positions that
are averaged against one MLP and against experts merged in the end; a filter of frequencies.

Conditional denoising on 16 x 16 centres of CIFAR-10 images, the condition being their 4 x 4 means.

Denoisers were trained at a constant rate at first, where every end is a draw; 5 seeds left four
promises open. Now the rate of every training falls to 0, and there are up to 8 seeds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.data.images import read_images
from sparseworks.diagnostics.claims import Claim, Promise, Setting, data_root
from sparseworks.experts.spectral import SpectralFilter
from sparseworks.experts.time_stages import TimeStages
from sparseworks.models.zoo import FeedForward

TIMES, STAGES, EXPERTS, BATCH = 1000, 4, 16, 16
KEPT = (1 - torch.linspace(0.0015, 0.0155, TIMES)).cumprod(0)


class Residual(nn.Module):
    """Two convolutions, shifted by the time."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.time = nn.Linear(32, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.first(F.silu(self.norm1(x))) + self.time(t)[..., None, None]
        out: Tensor = self.skip(x) + self.second(F.silu(self.norm2(y)))
        return out


class Beside(nn.Module):
    """x + layers(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class UNet(nn.Module):
    """Two levels of 16 and 32 channels, and x + mlp(norm(x)) over the 64 lower positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Conv2d(6, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.high, self.low, self.last = Residual(16, 16), Residual(32, 32), Residual(32, 16)
        self.down, self.up = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 16, 3, padding=1)
        self.norm, self.mlp = nn.LayerNorm(32), FeedForward(32, 128)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(16) * 0.6)
        t = torch.cat([angles.sin(), angles.cos()], 1)
        high = self.high(self.inlet(torch.cat([x, condition], 1)), t)
        low = self.low(self.down(high), t)
        tokens = low.flatten(2).transpose(1, 2)
        tokens = tokens + self.mlp(self.norm(tokens))
        low = tokens.transpose(1, 2).view(low.shape)
        y = torch.cat([high, self.up(F.interpolate(low, scale_factor=2))], 1)
        out: Tensor = self.outlet(F.silu(self.last(y, t)))
        return out


def _pictures(name: str, limit: int) -> Tensor:
    pixels = read_images(data_root() / "cifar10" / f"{name}.parquet", limit=limit).pixels
    return pixels[..., 8:24, 8:24].float() / 127.5 - 1


def _low(x: Tensor) -> Tensor:
    return F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)


def _error(model: nn.Module, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Squared error of the noise, for each sample."""
    a = KEPT[t][:, None, None, None]
    found = model(a.sqrt() * x + (1 - a).sqrt() * noise, t, _low(x))
    return (found - noise).square().mean((1, 2, 3))


def _fit(model: nn.Module, images: Tensor, steps: int, seed: int, draw: Any = None,
         run: Any = None) -> nn.Module:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    if run is not None:
        run.attach(optimizer)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(steps):
        x = images[torch.randint(0, len(images), (BATCH,), generator=g)]
        t = torch.randint(0, TIMES, (BATCH,), generator=g) if draw is None else draw(BATCH, g)
        loss = _error(model, x, t, torch.randn(x.shape, generator=g)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    if run is not None:
        run.finish()
    return model.eval()


def _autoencoder(seed: int, filtered: bool) -> nn.Sequential:
    """To 4 x 4 x 8 and back, with the layer under test at place 6."""
    torch.manual_seed(seed)
    tested: nn.Module = SpectralFilter(24, 1)
    if not filtered:
        tested = Beside(
            nn.Conv2d(24, 5, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(5, 24, 3, padding=1)
        )
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), nn.SiLU(), nn.Conv2d(24, 8, 3, 2, 1),
        nn.Conv2d(8, 24, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=4), tested,
        nn.Conv2d(24, 3, 3, padding=1),
    )  # fmt: skip


def _high_band(x: Tensor, y: Tensor) -> float:
    """Squared error of frequencies from half the highest, relative to their power."""
    fx, fy = torch.fft.fft2(x), torch.fft.fft2(y)
    f = torch.fft.fftfreq(16).abs()
    band = torch.maximum(f[:, None], f[None]) >= 0.25
    return float((fy - fx)[..., band].abs().square().sum() / fx[..., band].abs().square().sum())


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    base_steps, steps = (2000, 2000) if setting == "full" else (400, 320)
    images, held = _pictures("train", 10_000), _pictures("test", 256)
    g = torch.Generator().manual_seed(50_000 + seed)
    times = torch.arange(len(held)) * TIMES // len(held)
    noise = torch.randn(held.shape, generator=g)

    @torch.no_grad()
    def error(model: nn.Module) -> Tensor:
        """Mean in each stage, the images at four other times each."""
        rows = [
            _error(model, held, (times + k * TIMES // 4) % TIMES, noise.roll(k, 0))
            for k in range(4)
        ]
        t = torch.cat([(times + k * TIMES // 4) % TIMES for k in range(4)])
        stage = t * STAGES // TIMES
        return torch.stack([torch.cat(rows)[stage == s].mean() for s in range(STAGES)]).double()

    found: dict[str, float] = {}
    torch.manual_seed(seed)
    base = _fit(UNet(), images, base_steps, seed)
    found["base"] = float(error(base).mean())
    longer = error(_fit(copy.deepcopy(base), images, steps, seed + 1000))
    stages = TimeStages([copy.deepcopy(base) for _ in range(STAGES)], TIMES)
    for s in range(STAGES):
        draw = lambda n, g, s=s: stages.draw(s, n, g)  # noqa: E731
        _fit(stages.models[s], images, steps // STAGES, seed + 1000, draw)
    staged = error(stages)
    for s in range(STAGES):
        found[f"gain in stage {s}"] = float(longer[s] - staged[s])
    found["longer"], found["stages"] = float(longer.mean()), float(staged.mean())
    found["over longer"] = found["longer"] - found["stages"]
    found["stages that gain"] = float((staged < longer).sum()) - 2.5

    for arm, options in (
        ("one", None), ("averaged", {"ramp": max(1, steps // 2)}), ("unaveraged", {"rate": 0.0})
    ):  # fmt: skip
        torch.manual_seed(seed)
        model, run = UNet(), None
        if options is not None:
            run = sw.upcycle(model, "ss-moe", experts=EXPERTS, start="fresh", **options)
        found[arm] = float(error(_fit(model, images, steps, seed, run=run)).mean())
    found["averaged kept"] = 1.01 - found["averaged"] / found["one"]
    found["over unaveraged"] = found["unaveraged"] - found["averaged"]

    for arm in ("filter", "convolution"):
        model = _autoencoder(seed, arm == "filter")
        found[f"{arm} parameters"] = float(sum(p.numel() for p in model[6].parameters()))
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0)
        g = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x = images[torch.randint(0, len(images), (BATCH,), generator=g)]
            optimizer.zero_grad()
            torch.autograd.backward(F.mse_loss(model(x), x))
            optimizer.step()
        with torch.no_grad():
            found[arm] = _high_band(held, model(held))
    found["finer"] = 0.95 - found["filter"] / found["convolution"]
    return found


CLAIM = Claim(
    card="133",
    method="ss-moe",
    title="denoisers for parts of the time win over one trained longer; experts of random "
    "positions merge into one MLP",
    model="U-Net of two levels with 16 and 32 channels; 4 copies, or 16 experts for its MLP; an "
    "autoencoder with a filter of frequencies",
    data="16 x 16 centres of CIFAR-10 images given their 4 x 4 means; 400 steps of 16, then 320 in "
    "all for the stages; 320 for the experts (full: 2,000 each); the rate falls to 0",
    baseline="one denoiser for all times, as many steps in all; one MLP; experts that are averaged "
    "in the end only; two convolutions of about as many parameters",
    metric="squared error of the noise, mean over times; relative error of high frequencies",
    promises=(
        Promise("over longer", "four stages below one denoiser trained on"),
        Promise("stages that gain", "in at least three of the stages"),
        Promise("averaged kept", "averaged experts at most 1.01 of one MLP"),
        Promise("over unaveraged", "averaged experts below experts merged in the end"),
        Promise("finer", "high frequencies: error at most 0.95 of that with convolutions"),
    ),
    measure=measure,
    looks=(3, 5, 8),
    version=2,
)
