"""Models that every method can be tried on in a second: 8 x 8 images in one channel, ten classes.

The tests of methods import them; those of commands name them as FILE.py:FACTORY.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseworks.models.zoo import DDIM, SuperNetwork, TextToImage, ViT


def net() -> nn.Module:
    """Two convolutions under batch norm and two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def pointwise() -> nn.Module:
    """With 1 x 1 convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1),
        nn.Flatten(), nn.Linear(288, 10),
    ).eval()  # fmt: skip


def supernet() -> nn.Module:
    """All operations of a cell at once."""
    torch.manual_seed(0)
    return SuperNetwork(nodes=1, cells=1, channels=4, in_channels=1).eval()


def vit() -> nn.Module:
    """With attention probabilities that a module makes."""
    torch.manual_seed(0)
    return ViT(8, 4, 1, dim=16, depth=1, heads=2).eval()


def diffusion() -> nn.Module:
    """Noise from noisy images, times and words."""
    torch.manual_seed(0)
    return TextToImage(width=16, depth=1, heads=2, text_depth=1).eval()


class GatedBlock(nn.Module):
    """An MLP as language models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down_proj, self.act_fn = nn.Linear(32, 16), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return x + hidden


def gated() -> nn.Module:
    """With gated MLPs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), GatedBlock(), GatedBlock(), nn.Linear(16, 10)
    ).eval()


sampler = DDIM(steps=2)


def chains() -> list[tuple[Tensor, Tensor]]:
    """(noise, words), the start of one sampling chain."""
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 1, 8, 8, generator=g), torch.randint(0, 27, (2, 5), generator=g))]


FACTORIES = {
    "ast": gated,
    "bdwp": gated,
    "cast": gated,
    "cats": gated,
    "chess": gated,
    "dass": supernet,
    "ecodiff": diffusion,
    "fast-sparse-convnets": pointwise,
    "maskllm": gated,
    "slorb": gated,
    "sparse-then-prune": vit,
    "sparsing-law": gated,
}
"""The methods that `net` has nothing for."""
