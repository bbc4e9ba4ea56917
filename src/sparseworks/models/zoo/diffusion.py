"""A small text-to-image diffusion model: an encoder of words, a transformer that removes noise.

With a(t) = cos^2(pi t / 2) for t in [0, 1] and x_t = sqrt(a) x_0 + sqrt(1 - a) e, the denoiser
predicts e from x_t, t and the words. DDIM goes along t_0 > t_1 > ... > t_T = 0; from t to t':

    x_0' = (x_t - sqrt(1 - a(t)) e) / sqrt(a(t)),   x_t' = sqrt(a(t')) x_0' + sqrt(1 - a(t')) e.

Sources: Ho, Jain, Abbeel 2020, Denoising Diffusion Probabilistic Models; Song, Meng, Ermon 2021,
Denoising Diffusion Implicit Models; Peebles, Xie 2023, Scalable Diffusion Models with Transformers;
Nichol, Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models (the cosine).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "DDIM",
    "Denoiser",
    "TextEncoder",
    "TextToImage",
    "diffusion_loss",
    "fit_diffusion",
    "words_to_tokens",
]


def words_to_tokens(words: Sequence[str], length: int = 5) -> Tensor:
    """Letters a-z as 1-26, padded with 0, int64 `[words, length]`."""
    rows = [[ord(c) - ord("a") + 1 for c in w[:length].lower()] for w in words]
    return torch.tensor([r + [0] * (length - len(r)) for r in rows])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.size = width // heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, -1, self.size).permute(2, 0, 3, 1, 4)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class TextBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return y


class TextEncoder(nn.Module):
    """Tokens `[batch, length]` -> condition `[batch, width]`."""

    def __init__(self, width: int, depth: int, heads: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.place
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.norm(x).mean(1)
        return y


class DenoiserBlock(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        y = self.fc2(F.gelu(self.fc1(self.norm2(x) * (1 + scale2) + shift2)))
        z: Tensor = x + gate2 * y
        return z


class Denoiser(nn.Module):
    """Noisy images `[batch, 1, side, side]`, times `[batch]`, condition -> the noise in them."""

    frequencies: Tensor

    def __init__(self, width: int, depth: int, heads: int, side: int, patch: int) -> None:
        super().__init__()
        self.side, self.patch = side, patch
        self.inlet = nn.Linear(patch * patch, width)
        self.place = nn.Parameter(torch.randn((side // patch) ** 2, width) * 0.02)
        self.time = nn.Linear(32, width)
        self.blocks = nn.ModuleList(DenoiserBlock(width, heads) for _ in range(depth))
        self.norm, self.outlet = nn.LayerNorm(width), nn.Linear(width, patch * patch)
        frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), 16))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        c = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)) + condition)
        y = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        y = self.inlet(y) + self.place
        for block in self.blocks:
            y = block(y, c)
        y = self.outlet(self.norm(y)).transpose(1, 2)
        return F.fold(y, (self.side, self.side), self.patch, stride=self.patch)


class TextToImage(nn.Module):
    """Two components, `encoder` and `denoiser`.

    Args:
        width: of both.
        depth: blocks of the denoiser; the encoder has `text_depth`.
        heads: of every attention.
        text_depth: blocks of the encoder.
        side: of the images, in pixels.
        patch: side of a patch.
        length: tokens of a prompt.
        vocabulary: number of tokens.
    """

    def __init__(
        self, width: int = 64, depth: int = 3, heads: int = 4, text_depth: int = 2, side: int = 8,
        patch: int = 2, length: int = 5, vocabulary: int = 27,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = TextEncoder(width, text_depth, heads, length, vocabulary)
        self.denoiser = Denoiser(width, depth, heads, side, patch)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        y: Tensor = self.denoiser(x, t, self.encoder(tokens))
        return y


def diffusion_loss(
    model: nn.Module, images: Tensor, condition: Tensor, generator: torch.Generator
) -> Tensor:
    """E ||e - model(x_t, t, condition)||^2 over random t and e, mean per pixel."""
    t = torch.rand(len(images), generator=generator).to(images.device)
    e = torch.randn(images.shape, generator=generator).to(images)
    a = _a(t).view(-1, 1, 1, 1)
    return F.mse_loss(model(a.sqrt() * images + (1 - a).sqrt() * e, t, condition), e)


def fit_diffusion(
    model: nn.Module, images: Tensor, condition: Tensor, generator: torch.Generator, *,
    steps: int, batch: int = 64, lr: float = 2e-3,
) -> None:  # fmt: skip
    """Train in place on random batches: AdamW, the rate falling to 0 along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = torch.randint(len(images), (batch,), generator=generator)
        loss = diffusion_loss(model, images[index], condition[index], generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    model.eval()


@dataclass(frozen=True)
class DDIM:
    """Deterministic sampling in `steps` steps of a model called as (x, t, condition).

    Args:
        steps: of the chain.
        first: time of the first step, just below 1, where x_0 could not be told.
    """

    steps: int = 10
    first: float = 0.98

    def predict(self, model: nn.Module, x: Tensor, i: int, condition: Tensor) -> Tensor:
        """The noise that the model sees in step i."""
        t = torch.full((len(x),), self._time(i), device=x.device)
        e: Tensor = model(x, t, condition)
        return e

    def advance(self, x: Tensor, e: Tensor, i: int) -> Tensor:
        """x after step i."""
        then = _a(torch.tensor(self._time(i + 1), dtype=x.dtype)).to(x)
        return then.sqrt() * self.clean(x, e, i) + (1 - then).sqrt() * e

    def clean(self, x: Tensor, e: Tensor, i: int) -> Tensor:
        """x_0 as step i sees it."""
        now = _a(torch.tensor(self._time(i), dtype=x.dtype)).to(x)
        return (x - (1 - now).sqrt() * e) / now.sqrt()

    @torch.no_grad()
    def sample(self, model: nn.Module, noise: Tensor, condition: Tensor) -> Tensor:
        """Images from noise."""
        x = noise
        for i in range(self.steps):
            x = self.advance(x, self.predict(model, x, i, condition), i)
        return x

    def _time(self, i: int) -> float:
        return self.first * (1 - i / self.steps)


def _a(t: Tensor) -> Tensor:
    return torch.cos(t * math.pi / 2).square()
