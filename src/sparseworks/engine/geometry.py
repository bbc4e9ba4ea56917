"""Sizes of a program's values, and where each lies in its working memory.

A value takes channels x plane floats. An image has `pad` zero pixels to its left, shared with the
right end of the row before, and `pad` zero rows above and below; `lanes` is 1, or 16 images whose
pixels lie side by side. All images of one height and width have the same padding, so that they can
be added as they lie.

Where rows nearly fill whole vectors and taps reach one pixel to either side, an image has no pixels
between its rows. Behind its channels come copies of them, moved by one pixel to the right and to
the left: so that every load of a convolution is aligned.

Where several threads work on such an image it is cut into bands of rows, one for each thread, and
each band lies in working memory of its own, at the same place: cores that write near to each other
get in each other's way. The padding between two bands holds a copy of the other band's row, which
is made where it is needed.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Geometry", "arrange", "fills", "image", "tokens", "whole_rows"]

_VECTOR = 16
_SLACK = 2048  # floats before and after everything, that shifted reads may touch


@dataclass(frozen=True)
class Geometry:
    """As the native code has it; distances in floats."""

    height: int
    width: int
    pad: int
    lanes: int
    pitch: int
    plane: int
    origin: int
    bands: int = 1

    @property
    def size(self) -> int:
        """Floats of a channel: its planes in all bands."""
        return self.plane * self.bands

    def numbers(self) -> list[int]:
        return [
            self.height, self.width, self.pad, self.lanes, self.pitch, self.plane, self.origin,
            self.bands,
        ]  # fmt: skip


def fills(width: int) -> bool:
    """Whether rows of this width fill vectors well."""
    return width >= 0.75 * _round_up(width)


def whole_rows(height: int, width: int, pad: int, bands: int = 1) -> Geometry:
    """Planes of rows that begin and end with a vector; nothing lies between them."""
    pitch = _round_up(width)
    plane = (height // bands + 2 * pad) * pitch
    return Geometry(height, width, pad, 1, pitch, plane, pad * pitch, bands)


def image(height: int, width: int, pad: int, lanes: int) -> Geometry:
    """Planes of pixels."""
    pitch = (width + pad) * lanes
    origin = (pad * (width + pad) + pad) * lanes
    end = origin + (height - 1) * pitch + width * lanes
    whole = origin + (height + pad) * pitch
    return Geometry(height, width, pad, lanes, pitch, _round_up(max(whole, end + _VECTOR)), origin)


def tokens(count: int) -> Geometry:
    """One row of positions; planes of a power of two would meet in the same cache sets."""
    plane = _round_up(count)
    if plane > 64:  # few different planes, so that programs of other lengths share packed weights
        plane = (plane + 63) // 64 * 64
    if plane > 256:
        plane += _VECTOR
    return Geometry(1, count, 0, 1, plane, plane, 0)


def _round_up(count: int) -> int:
    return (count + _VECTOR - 1) // _VECTOR * _VECTOR


def arrange(sizes: Sequence[int], lives: Iterable[tuple[int, int]]) -> tuple[list[int], int]:
    """Places in one arena: values whose lives overlap do not.

    Args:
        sizes: floats of each value.
        lives: first and last operation that touches it.

    Returns:
        The place of each, and the size of the arena.
    """
    spans = list(lives)
    places = [0] * len(sizes)
    alive: list[tuple[int, int, int]] = []  # place, end and last operation, by place
    end = 0
    for i in sorted(range(len(sizes)), key=lambda i: (spans[i][0], -sizes[i])):
        alive = [value for value in alive if value[2] >= spans[i][0]]
        at = _SLACK
        for start, stop, _ in alive:
            if at + sizes[i] <= start:
                break
            at = max(at, stop)
        places[i] = at
        insort(alive, (at, at + sizes[i], spans[i][1]))
        end = max(end, at + sizes[i])
    return places, end + _SLACK
