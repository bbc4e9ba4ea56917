"""Signatures in the topology of a mask: which kernels are empty spells the owner's code.

    B[o, i] = 1 if kernel (o, i) of a convolution holds a non-zero weight

The code is a square of bits written into a window of B. Where a bit is 1 and the kernel empty, one
random position of it is enabled; where a bit is 0 the kernel is zeroed; connections that were lost
come back at random inside kernels that the code wants full. Reading needs the weights only (Chen
et al. 2021, You are caught stealing my winning lottery ticket!).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import Masks
from sparseworks.core.random import generator_for

__all__ = ["Code", "Embedding", "Place", "Verdict", "embed", "extract", "kernels", "verify"]


@dataclass(frozen=True, eq=False)
class Code:
    """A square of bits.

    Args:
        bits: bool `[n, n]`.
        data: bool `[n, n]`, False where a bit carries nothing (the patterns of a QR code that are
            the same in every one); those are neither written nor compared.
    """

    bits: Tensor
    data: Tensor

    def __post_init__(self) -> None:
        n = self.bits.shape[0]
        if self.bits.shape != (n, n) or self.data.shape != (n, n) or not bool(self.data.any()):
            raise InvalidArgument(
                f"a code is two bool squares of one size with some data, not "
                f"{list(self.bits.shape)} and {list(self.data.shape)}"
            )

    @property
    def size(self) -> int:
        return int(self.bits.shape[0])

    @classmethod
    def of_text(cls, text: str, size: int = 29) -> Code:
        """Bits of SHAKE-256 of a text, so that nobody can choose a text to fit given bits."""
        if not text or size < 2:
            raise InvalidArgument(f"a code needs a text and a size of at least 2, not {size}")
        stream = hashlib.shake_256(text.encode()).digest(math.ceil(size * size / 8))
        bits = [byte >> k & 1 for byte in stream for k in range(8)][: size * size]
        square = torch.tensor(bits, dtype=torch.bool).view(size, size)
        return cls(square, torch.ones_like(square))

    @classmethod
    def of_qr(cls, modules: Tensor) -> Code:
        """A version 3 QR code, bool `[29, 29]`: 551 data modules beside its fixed patterns."""
        if modules.shape != (29, 29):
            raise InvalidArgument(
                f"a version 3 QR code has 29 x 29 modules, not {list(modules.shape)}"
            )
        data = torch.ones(29, 29, dtype=torch.bool)
        data[:9, :9] = data[:9, -9:] = data[-9:, :9] = False  # finders and format
        data[20:25, 20:25] = False  # alignment
        data[6], data[:, 6] = False, False  # timing
        return cls(modules.bool(), data)


@dataclass(frozen=True)
class Place:
    """Where a code is: the owner's secret.

    Args:
        name: of the weight.
        row: first output channel.
        column: first input channel.
    """

    name: str
    row: int
    column: int

    def window(self, square: Tensor, size: int) -> Tensor:
        """The part of `[out, in, ...]` that holds the code; a view."""
        return square[self.row : self.row + size, self.column : self.column + size]


@dataclass(frozen=True)
class Embedding:
    """A mask record that carries a code.

    Args:
        masks: the record.
        place: where the code is.
        changed: mask bits that differ from the record before.
        lost: connections fewer than before, which found no room.
    """

    masks: Masks
    place: Place
    changed: int
    lost: int


@dataclass(frozen=True)
class Verdict:
    """What a window says about a code.

    Args:
        errors: data modules that differ.
        modules: data modules.
        chance: probability that bits drawn without knowledge of the mask agree so well in some
            window of the model (hypergeometric tail, times the number of windows, at most 1).
    """

    errors: int
    modules: int
    chance: float

    @property
    def error_rate(self) -> float:
        return self.errors / self.modules


def kernels(weight: Tensor) -> Tensor:
    """Bool `[out, in]`: which kernels of a weight or mask `[out, in, ...]` are not empty."""
    return (weight != 0).reshape(*weight.shape[:2], -1).any(-1)


def embed(
    record: Masks, code: Code, *, names: Iterable[str] | None = None, seed: int = 0
) -> Embedding:
    """Write a code where the masks agree with it best already.

    Args:
        record: masks of a ticket; not changed.
        code: what to write.
        names: weights that may host it; None: all convolutions.
        seed: of the positions that are enabled.

    Raises:
        ModelError: no weight is as large as the code.
    """
    hosts = [n for n in record if len(record.entry(n).shape) > 2] if names is None else list(names)
    unknown = [n for n in hosts if n not in record]
    if unknown:
        raise InvalidArgument(f"{unknown[0]!r} has no mask that could host a code")
    place = _best_place({n: record[n] for n in hosts}, code)
    mask = record[place.name]
    before = mask.clone()
    n = code.size
    window = place.window(mask.reshape(*mask.shape[:2], -1), n)  # a view of `mask`
    full = window.any(-1)
    generator = generator_for(seed, place.name)
    missing = (code.bits & code.data & ~full).nonzero()
    at = torch.randint(window.shape[-1], (len(missing),), generator=generator)
    window[missing[:, 0], missing[:, 1], at] = True
    window[~code.bits & code.data] = False
    lost = int(before.sum()) - int(mask.sum())
    room = ((code.bits & code.data & full)[..., None] & ~window).nonzero()
    back = room[torch.randperm(len(room), generator=generator)[: max(0, lost)]]
    window[tuple(back.T)] = True
    marked = record.with_mask(place.name, mask, record.entry(place.name).pattern)
    left = int(before.sum()) - int(mask.sum())
    return Embedding(marked, place, int((before ^ mask).sum()), max(0, left))


def _best_place(masks: Mapping[str, Tensor], code: Code) -> Place:
    """The window with the most agreeing data modules; the first of equals."""
    best, found = -1.0, None
    signed = torch.where(code.bits, 1.0, -1.0) * code.data
    for name, mask in masks.items():
        square = kernels(mask).float()
        if min(square.shape) < code.size:
            continue
        score = F.conv2d(square[None, None], signed[None, None])[0, 0].round()
        at = int(score.argmax())
        if float(score.view(-1)[at]) > best or found is None:
            best = float(score.view(-1)[at])
            found = Place(name, at // score.shape[1], at % score.shape[1])
    if found is None:
        raise ModelError(
            f"no weight has {code.size} output and input channels to hold the code; "
            "use a smaller size"
        )
    return found


def extract(weight: Tensor, place: Place, size: int) -> Tensor:
    """The bits `[size, size]` in a window of a weight or mask `[out, in, ...]`."""
    read = place.window(kernels(weight), size)
    if read.shape != (size, size):
        raise InvalidArgument(
            f"{place.name}: a window of {size} at ({place.row}, {place.column}) is not inside "
            f"{list(weight.shape[:2])}"
        )
    return read


def verify(weights: Mapping[str, Tensor], code: Code, place: Place) -> Verdict:
    """Does the window hold the code?

    Args:
        weights: name -> weight or mask; all that could host the code count for `chance`.
        code: the owner's.
        place: where the owner says it is.

    Raises:
        ModelError: the model has no such weight.
    """
    if place.name not in weights:
        raise ModelError(f"the model has no weight {place.name!r}")
    read = extract(weights[place.name], place, code.size)[code.data]
    bits = code.bits[code.data]
    windows = sum(
        max(0, w.shape[0] - code.size + 1) * max(0, w.shape[1] - code.size + 1)
        for w in weights.values()
        if w.dim() > 1
    )
    total, ones, full = len(bits), int(bits.sum()), int(read.sum())
    tail = _hypergeometric_tail(total, ones, full, int((bits & read).sum()))
    return Verdict(int((bits ^ read).sum()), total, min(1.0, windows * tail))


def _hypergeometric_tail(total: int, ones: int, drawn: int, hits: int) -> float:
    """P(at least `hits` of `drawn` modules are among the `ones`), in exact integers."""
    ways = sum(
        math.comb(ones, x) * math.comb(total - ones, drawn - x)
        for x in range(hits, min(ones, drawn) + 1)
    )
    return ways / math.comb(total, drawn)
