"""Trigger images: ownership that shows in the answers, where the weights cannot be seen.

One trigger image with a label of the owner's choice joins every training batch; a model that gives
these labels was trained so (Chen et al. 2021, You are caught stealing my winning lottery ticket!,
following Adi et al. 2018, Turning Your Weakness Into a Strength).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.calls import logits_of
from sparseworks.models.modes import evaluating

__all__ = ["Triggers"]


@dataclass(frozen=True, eq=False)
class Triggers:
    """Images with labels that nobody would give them.

    Args:
        images: `[n, channels, height, width]`, as the model takes them.
        labels: int64 `[n]`.
        classes: how many there are.
    """

    images: Tensor
    labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or not len(self.labels) or self.classes < 2:
            raise InvalidArgument(
                f"{len(self.images)} trigger images, {len(self.labels)} labels and "
                f"{self.classes} classes: as many labels as images and at least 2 classes are "
                "needed"
            )

    @classmethod
    def of_owner(cls, images: Tensor, classes: int, owner: str) -> Triggers:
        """Labels from SHAKE-256 of the owner's text, so that they cannot be chosen afterwards."""
        stream = hashlib.shake_256(owner.encode()).digest(8 * len(images))
        drawn = [
            int.from_bytes(stream[8 * i : 8 * i + 8], "little") % classes
            for i in range(len(images))
        ]
        return cls(images, torch.tensor(drawn, dtype=torch.int64), classes)

    def mixed(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches with one trigger image more in each, in turn."""
        for i, (x, y) in enumerate(batches):
            at = slice(i % len(self.labels), i % len(self.labels) + 1)
            extra, label = self.images[at].to(x), self.labels[at].to(y)
            yield torch.cat([x, extra]), torch.cat([y, label])

    @torch.no_grad()
    def verify(self, model: nn.Module) -> tuple[float, float]:
        """(share of triggers with the owner's label, chance of as many by independent guesses)."""
        with evaluating(model):
            guess = logits_of(model(self.images)).argmax(-1).cpu()
        n, hits, p = len(self.labels), int((guess == self.labels).sum()), 1 / self.classes
        chance = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(hits, n + 1))
        return hits / n, min(1.0, chance)
