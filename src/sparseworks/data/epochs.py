"""Training data as functions of the epoch: the same (seed, epoch) gives the same batches again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparseworks.core.errors import DataError
from sparseworks.core.random import generator_for
from sparseworks.data.images import ImageSet

__all__ = ["Batches", "ImageEpochs", "TextEpochs"]


class Batches(Protocol):
    """Training data: batches as functions of the epoch."""

    def __len__(self) -> int:
        """Batches an epoch."""

    def epoch(self, number: int) -> Iterator[Any]:
        """The batches of one epoch, always the same for the same number."""


@dataclass(frozen=True)
class ImageEpochs:
    """Shuffled, augmented `(images, labels)`; the last short batch of an epoch is left out.

    Args:
        images: what to train on.
        batch_size: images a batch.
        seed: of order and augmentation.
        augment: random crops and flips.
    """

    images: ImageSet
    batch_size: int
    seed: int = 0
    augment: bool = True

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = generator_for(self.seed, "epoch", number)
        return self.images.epoch(self.batch_size, generator, training=self.augment)


@dataclass(frozen=True)
class TextEpochs:
    """Shuffled windows of a token stream that do not overlap; each epoch cuts elsewhere.

    Args:
        ids: token ids, `[tokens]` int64.
        length: tokens of a window.
        batch_size: windows a batch; the last short batch of an epoch is left out.
        seed: of cuts and order.

    Raises:
        DataError: fewer tokens than one window.
    """

    ids: Tensor
    length: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.ids) < self.length:
            raise DataError(
                f"the text has {len(self.ids)} tokens, fewer than one window of {self.length}; "
                "give more text or a smaller length"
            )

    def __len__(self) -> int:
        return len(self.ids) // self.length // self.batch_size

    def epoch(self, number: int) -> Iterator[dict[str, Tensor]]:
        generator = generator_for(self.seed, "epoch", number)
        count = len(self.ids) // self.length
        spare = len(self.ids) - count * self.length
        first = int(torch.randint(0, spare + 1, (), generator=generator))
        rows = self.ids[first : first + count * self.length].view(count, self.length)
        order = torch.randperm(count, generator=generator)
        for index in torch.split(order, self.batch_size):
            if len(index) == self.batch_size:
                yield {"input_ids": rows[index]}
