"""Images with labels: parquet files of encoded images, class folders, scikit-learn's digits."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import DataError, InvalidArgument, MissingDependency
from sparseworks.data.parquet import column_names, read_parquet
from sparseworks.data.paths import existing

__all__ = ["ImageSet", "augment", "digits", "holds_images", "read_images"]

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSet:
    """Decoded images and their labels.

    Args:
        pixels: uint8 `[n, channels, height, width]`.
        labels: int64 `[n]`.
        mean: per channel, of images in [0, 1].
        std: per channel.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __len__(self) -> int:
        return len(self.labels)

    def normalized(self, index: Tensor | slice) -> Tensor:
        """fp32 images (x / 255 - mean) / std."""
        x = self.pixels[index].float() / 255
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def batches(
        self, batch_size: int = 100, *, samples: int | None = None, seed: int | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """`(images, labels)`; a random choice with a seed, else in order."""
        if batch_size < 1:
            raise InvalidArgument(f"batch_size={batch_size} must be at least 1")
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        chosen = order[:samples]
        return [(self.normalized(i), self.labels[i]) for i in torch.split(chosen, batch_size)]

    def epoch(
        self, batch_size: int, generator: torch.Generator, *, training: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One shuffled pass with random crops and flips; the last short batch is left out."""
        order = torch.randperm(len(self), generator=generator)
        for index in torch.split(order, batch_size):
            if len(index) == batch_size:
                x = self.normalized(index)
                yield (augment(x, generator) if training else x), self.labels[index]


def augment(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Random shifts by up to `padding` pixels (zeros come in) and horizontal flips."""
    n, c, h, w = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(h)
    columns = left[:, None] + torch.arange(w)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    flat = rows[:, :, None] * (w + 2 * padding) + columns[:, None, :]
    return padded.flatten(2).gather(2, flat.view(n, 1, -1).expand(-1, c, -1)).view(n, c, h, w)


def holds_images(source: str | os.PathLike[str]) -> bool:
    """Is it a folder of class folders with images, or a parquet file with a column of images?"""
    path = Path(source)
    if path.is_dir():
        folders = [p for p in path.iterdir() if p.is_dir()]
        return any(
            f.suffix.lower() in (".png", ".jpg", ".jpeg") for d in folders[:3] for f in d.iterdir()
        )
    if path.suffix != ".parquet" or not path.is_file():
        return False
    try:
        names = column_names(path)
    except Exception:  # the reader itself says what is wrong with the file
        return False
    return any(n in names for n in ("image", "img"))


def read_images(source: str | os.PathLike[str], *, limit: int | None = None) -> ImageSet:
    """Images of a parquet file (`image` bytes, `label`) or of a folder with one folder a class.

    Raises:
        DataError: missing, empty, undecodable, or of different sizes.
    """
    path = existing(source)
    if path.is_dir():
        classes = sorted(p for p in path.iterdir() if p.is_dir())
        files = [
            (f, i)
            for i, folder in enumerate(classes)
            for f in sorted(folder.rglob("*"))
            if f.suffix.lower() in _IMAGE_SUFFIXES
        ][:limit]
        if not files:
            raise DataError(f"{path}: no images in class folders (folder/<class>/<image>)")
        encoded: Sequence[Any] = [f.read_bytes() for f, _ in files]
        labels = [label for _, label in files]
        names = [str(f) for f, _ in files]
    else:
        encoded, labels = _parquet_columns(path, limit)
        names = [f"{path} row {i}" for i in range(len(encoded))]
    if not len(encoded):
        raise DataError(f"{path}: the file holds no images")
    return ImageSet(_decode(encoded, names), torch.tensor(labels, dtype=torch.int64))


def _parquet_columns(path: Path, limit: int | None) -> tuple[list[Any], list[int]]:
    table = read_parquet(path).slice(0, limit)
    label = next((n for n in ("label", "labels", "fine_label") if n in table.column_names), None)
    image = next((n for n in ("image", "img") if n in table.column_names), None)
    if image is None or label is None:
        raise DataError(f"{path}: needs columns `image` and `label`, has {table.column_names}")
    rows = table[image].to_pylist()
    return [r["bytes"] if isinstance(r, dict) else r for r in rows], table[label].to_pylist()


def _decode(encoded: Sequence[bytes], names: Sequence[str]) -> Tensor:
    try:
        import numpy as np
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingDependency("images need pillow: pip install 'sparseworks[data]'") from None
    pixels: Any = None
    for i, data in enumerate(encoded):
        try:
            array = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except (UnidentifiedImageError, OSError, TypeError) as error:
            raise DataError(f"{names[i]}: not an image ({error})") from None
        if pixels is None:
            pixels = np.empty((len(encoded), *array.shape), dtype=np.uint8)
        if array.shape != pixels.shape[1:]:
            raise DataError(
                f"{names[i]}: size {array.shape[:2]} differs from {pixels.shape[1:3]} of the first;"
                " resize the images to one size"
            )
        pixels[i] = array
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, one channel, ten classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependency(
            "the digits need scikit-learn: pip install 'sparseworks[data]'"
        ) from None
    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round()).to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    return ImageSet(pixels, labels, mean=(0.305,), std=(0.376,))
