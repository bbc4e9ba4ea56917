"""Progressive masked images: hide patches, reconstruct their pixels from the tokens.

error = mean over hidden pixels of |decoder(token) - standardised pixel|, with a linear decoder. A
hidden patch shows one learned patch instead, which the embedding turns into a mask token; a pixel
is standardised by the mean and variance of its channel in the window of 47 x 47 pixels around it.

Source: He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, as used by Ye et al. 2024,
Once for Both (there a growing share of patches is hidden); the target is that of Liu et al. 2022,
Swin Transformer V2 (self-supervised case study, with SimMIM).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.blocks import first_tensor
from sparseworks.models.calls import Batch, call, split

__all__ = ["Pmim", "hide_patches", "patch_pixels", "standardised"]

WINDOW = 47


def patch_pixels(images: Tensor, side: int) -> Tensor:
    """`[batch, patches, channels * side^2]` from `[batch, channels, height, width]`."""
    return F.unfold(images, side, stride=side).transpose(1, 2)


def standardised(images: Tensor, window: int = WINDOW) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-6) over the window around each pixel, within the image."""

    def around(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, 1, window // 2, count_include_pad=False)

    mean = around(images)
    there = F.avg_pool2d(torch.ones_like(images), window, 1, window // 2) * window**2
    variance = (around(images.square()) - mean.square()).clamp_min(0)
    variance = variance * there / (there - 1).clamp_min(1)
    return (images - mean) / (variance + 1e-6).sqrt()


def hide_patches(images: Tensor, side: int, hidden: Tensor, mask: Tensor) -> Tensor:
    """Images with `mask` `[channels, side, side]` where `hidden` `[batch, patches]` is True."""
    rows, columns = images.shape[-2] // side, images.shape[-1] // side
    grid = hidden.view(len(images), 1, rows, columns)
    grid = grid.repeat_interleave(side, 2).repeat_interleave(side, 3)
    return torch.where(grid, mask.repeat(1, rows, columns), images)


class Pmim:
    """Hides patches of a model's images and measures how well its tokens tell them.

    Args:
        model: a vision transformer; a hook stays on it until `close`.
        example: one batch of images.
        tokens: name of the module whose output holds the tokens `[batch, n, width]`; the last ones
            are the patches, in order (a class token comes first).
        side: of a patch, in pixels.
        seed: of what is hidden.

    Raises:
        InvalidArgument: there is no such module, or its output does not hold the patches.
    """

    def __init__(
        self, model: nn.Module, example: Batch, tokens: str, side: int, seed: int = 0
    ) -> None:
        images = split(example)[0]
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise InvalidArgument("patches= hides parts of images: the batch must be a 4-d Tensor")
        if images.shape[-1] % side or images.shape[-2] % side:
            raise InvalidArgument(f"patches of side {side} do not tile images {images.shape[-2:]}")
        if tokens not in dict(model.named_modules()):
            raise InvalidArgument(f"patches=: there is no module {tokens!r} in the model")
        self._side, self._tokens, self._hidden, self._pixels = side, images, images, images
        self._generator = torch.Generator().manual_seed(seed)
        self._handle = model.get_submodule(tokens).register_forward_hook(self._see)
        with torch.no_grad():
            call(model, images[:1])
        count = images.shape[-1] * images.shape[-2] // side**2
        if self._tokens.ndim != 3 or self._tokens.shape[1] < count:
            self.close()
            raise InvalidArgument(
                f"{tokens!r} gives {tuple(self._tokens.shape)}, not one token for each of "
                f"{count} patches"
            )
        self._count = count
        self._decoder = nn.Linear(self._tokens.shape[-1], images.shape[1] * side**2)
        self._decoder.to(images.device)
        self._mask = nn.Parameter(torch.zeros_like(images[0, :, :side, :side]))

    def close(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The decoder and the patch that hidden ones show, to train with the model."""
        yield self._mask
        yield from self._decoder.parameters()

    def hide(self, images: Tensor, kept: float) -> Tensor:
        """The images with a random share `1 - kept` of their patches hidden (at least one)."""
        count = max(1, round((1 - kept) * self._count))
        noise = torch.rand(len(images), self._count, generator=self._generator).to(images.device)
        self._hidden = noise.argsort(1) < count
        self._pixels = patch_pixels(standardised(images), self._side)
        return hide_patches(images, self._side, self._hidden, self._mask)

    def error(self) -> Tensor:
        """Mean absolute error over the hidden pixels of the last forward pass."""
        guess: Tensor = self._decoder(self._tokens[:, -self._count :])
        return (guess - self._pixels)[self._hidden].abs().mean()

    def _see(self, module: nn.Module, inputs: object, output: object) -> None:
        found = first_tensor(output)
        if found is not None:
            self._tokens = found
