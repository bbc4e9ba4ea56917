"""An adaptive filter of frequencies (Luo, Xiang et al. 2023, for the decoder of latent diffusion).

    X = rfft2(x),   M = softshrink(W_2 leaky(W_1 X + b_1) + b_2),   y = x + irfft2(M X)

with complex W in diagonal blocks over channels and orthonormal transforms; the leaky ReLU (0.1) and
the shrinkage act on real and imaginary parts alike. A frequency shrunk to 0 is not compensated.
Released code takes the block from Huang et al. 2023 (Adaptive Frequency Filters As Efficient Global
Token Mixers); equation, values of W at first and lambda are as there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument

__all__ = ["SpectralFilter"]


class SpectralFilter(nn.Module):
    """Of images `[batch, channels, height, width]`; at first M is near 0 and y near x.

    Args:
        channels: that `blocks` divides.
        blocks: of the channels' mixing.
        shrink: lambda of the shrinkage.
        generator: of the first values.
    """

    def __init__(
        self, channels: int, blocks: int = 8, shrink: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if blocks < 1 or channels % blocks or shrink < 0:
            raise InvalidArgument(f"{channels} channels in {blocks} blocks, shrink={shrink} from 0")
        self.blocks, self.shrink = blocks, shrink
        size = channels // blocks

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(2, *shape, generator=generator))

        self.first, self.second = drawn(blocks, size, size), drawn(blocks, size, size)
        self.first_bias, self.second_bias = drawn(blocks, size, 1), drawn(blocks, size, 1)

    def mask(self, spectrum: Tensor) -> Tensor:
        """M of X, complex `[batch, channels, height, width // 2 + 1]`."""
        z = torch.unflatten(spectrum.flatten(2), 1, (self.blocks, -1))
        z = torch.complex(*self.first) @ z + torch.complex(*self.first_bias)
        z = torch.complex(F.leaky_relu(z.real, 0.1), F.leaky_relu(z.imag, 0.1))
        z = torch.complex(*self.second) @ z + torch.complex(*self.second_bias)
        z = torch.complex(F.softshrink(z.real, self.shrink), F.softshrink(z.imag, self.shrink))
        return z.flatten(1, 2).view(spectrum.shape)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, norm="ortho")
        size = x.shape[-2:]
        added: Tensor = torch.fft.irfft2(self.mask(spectrum) * spectrum, s=size, norm="ortho")
        return x + added
