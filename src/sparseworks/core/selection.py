"""Exact top-k: the arithmetic under every pattern and budget.

All functions take fp32 scores (other dtypes are converted), treat -0.0 as equal to 0.0, and keep
the lowest flat index among ties. They are exact for any size, never sort a whole tensor, and never
hold more than a chunk beside their result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument

__all__ = [
    "check_scores",
    "joint_keep_counts",
    "keep_top",
    "keep_top_in_runs",
    "keep_top_per_row",
    "radix_threshold",
]

_CHUNK = 1 << 22  # elements converted at a time
_CACHED = 1 << 18  # elements whose scores, comparisons and ranks stay in a cache
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # a byte for each element of a run


def _ordered_keys(scores: Tensor) -> Tensor:
    """int32 keys whose order is the order of the fp32 scores (-0.0 and 0.0 share a key)."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # of negative ones: not


def _chunks(flat: Tensor) -> Iterable[Tensor]:
    for start in range(0, flat.numel(), _CHUNK):
        yield flat[start : start + _CHUNK]


def check_scores(scores: Tensor, where: str = "scores") -> int:
    """Return how many scores are eligible (not -inf); refuse NaN.

    Raises:
        InvalidArgument: a score is NaN.
    """
    eligible = 0
    for chunk in _chunks(scores.reshape(-1)):
        total = chunk.float().sum(dtype=torch.float32)
        if bool(torch.isfinite(total)):
            eligible += chunk.numel()
            continue
        if torch.isnan(total) and bool(torch.isnan(chunk).any()):
            raise InvalidArgument(f"{where}: NaN; check the weights and the calibration data")
        eligible += chunk.numel() - int(torch.isneginf(chunk).sum())
    return eligible


def radix_threshold(
    flats: Sequence[Tensor],
    keep: int,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> tuple[int, int]:
    """The key of the keep-th largest score over several flat tensors, and the ties to keep there.

    Two passes over 16-bit histograms of order-preserving integer keys. Because histograms add,
    `reduce` may sum them over processes: the result is then the threshold of the whole.

    Args:
        flats: flat score tensors that compete together.
        keep: how many of all their elements are kept, at least 1 and at most their number.
        reduce: sums an int64 histogram over ranks; identity when None.

    Returns:
        (key, ties): every element with a larger key is kept, and `ties` of those with this key.
    """

    def histogram(select: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(1 << 16, dtype=torch.int64)
        for flat in flats:
            for chunk in _chunks(flat):
                total += torch.bincount(select(_ordered_keys(chunk)), minlength=1 << 16).cpu()
        return reduce(total) if reduce is not None else total

    def bucket_of(hist: Tensor, wanted: int) -> tuple[int, int]:
        above = hist.flip(0).cumsum(0)  # how many fall in this bucket or a higher one
        position = int(torch.searchsorted(above, wanted))
        before = int(above[position - 1]) if position else 0
        return (1 << 16) - 1 - position, wanted - before

    high, rest = bucket_of(histogram(lambda k: (k >> 16) + (1 << 15)), keep)
    low, ties = bucket_of(histogram(lambda k: k[(k >> 16) == high - (1 << 15)] & 0xFFFF), rest)
    return ((high - (1 << 15)) << 16) | low, ties


def _mask_at(flat: Tensor, key: int, ties: int) -> Tensor:
    """Mask of the elements above `key` and of the first `ties` elements at it."""
    mask = torch.empty(flat.numel(), dtype=torch.bool, device=flat.device)
    for start, chunk in zip(range(0, flat.numel(), _CHUNK), _chunks(flat)):
        keys = _ordered_keys(chunk)
        part = keys > key
        if ties:
            where = (keys == key).nonzero().view(-1)[:ties]
            part[where] = True
            ties -= where.numel()
        mask[start : start + chunk.numel()] = part
    return mask


def keep_top(scores: Tensor, keep: int, where: str = "scores") -> Tensor:
    """Bool mask of the `keep` highest scores of the whole tensor, exactly `keep` True.

    Raises:
        InvalidArgument: NaN scores, `keep` out of range, or fewer eligible scores than `keep`.
    """
    _check_keep(keep, scores.numel(), check_scores(scores, where), where)
    if keep == scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    key, ties = radix_threshold([flat], keep)
    return _mask_at(flat, key, ties).view(scores.shape)


def keep_top_per_row(scores: Tensor, keep: int, where: str = "scores") -> Tensor:
    """Bool mask `[rows, columns]` of the `keep` highest scores of every row.

    Raises:
        InvalidArgument: NaN scores, `keep` out of range, or a row with fewer eligible scores.
    """
    rows, columns = scores.shape
    _check_keep(keep, columns, columns, where)
    check_scores(scores, where)
    if keep == columns:
        if bool(torch.isneginf(scores).any()):
            raise InvalidArgument(f"{where}: a row has fewer than {keep} eligible scores (-inf)")
        return torch.ones_like(scores, dtype=torch.bool)
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    step = max(1, _CACHED // max(1, columns))
    exact = torch.float64 if columns >> 24 else torch.float32  # counts as numbers: bool sums slowly
    counted = torch.empty(min(step, rows), columns, dtype=exact, device=scores.device)
    for start in range(0, rows, step):
        part = scores[start : start + step].float()
        edge = _nth_largest(part, keep)
        if bool(torch.isneginf(edge).any()):
            row = start + int(torch.isneginf(edge).view(-1).nonzero()[0])
            raise InvalidArgument(
                f"{where}: row {row} has fewer than {keep} eligible scores (the others are -inf)"
            )
        kept = torch.ge(part, edge, out=mask[start : start + step])
        count = torch.ge(part, edge, out=counted[: part.shape[0]]).sum(1)
        surplus = (count > keep).nonzero().view(-1)
        if surplus.numel():
            above, tied = part[surplus] > edge[surplus], part[surplus] == edge[surplus]
            missing = keep - above.sum(1, keepdim=True)
            kept[surplus] = above | (tied & (tied.cumsum(1) <= missing))
    return mask


def _nth_largest(rows: Tensor, n: int) -> Tensor:
    """The n-th largest number of every row, `[rows, 1]`, from the shorter end."""
    columns = rows.shape[1]
    if 2 * n <= columns:
        return torch.topk(rows, n, dim=1, sorted=False).values.amin(1, keepdim=True)
    lowest = torch.topk(rows, columns - n + 1, dim=1, largest=False, sorted=False).values
    return lowest.amax(1, keepdim=True)


def keep_top_in_runs(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool mask of the `n` highest scores of every `m` consecutive ones; ties keep the first.

    An entry's rank is the number of those in its run that beat it. Nothing is sorted or moved:
    entry i is compared with i + d for d = 1 .. m - 1 over whole tensors, and the ranks of a run are
    the bytes of one integer.

    Args:
        scores: without NaN, their number a multiple of m; m is 2, 4 or 8.
    """
    flat = scores.reshape(-1)
    mask = torch.empty(flat.numel(), dtype=torch.bool, device=flat.device)
    size = max(m, min(_CACHED, flat.numel()))
    part = torch.zeros(size + m, dtype=torch.float32, device=flat.device)
    beats = torch.empty(size, dtype=torch.float32, device=flat.device)  # slow to write as bool
    word = torch.empty(size // m, dtype=_WORDS[m], device=flat.device)
    rank = torch.empty(size // m, dtype=_WORDS[m], device=flat.device)
    ones = sum(1 << 8 * i for i in range(m))
    first = sum((m - 1 - i) << 8 * i for i in range(m))  # as if all later entries beat an entry
    for start in range(0, flat.numel(), size):
        chunk = flat[start : start + size]
        part[: chunk.numel()] = chunk
        rank.fill_(first)
        for d in range(1, m):
            torch.ge(part[:size], part[d : size + d], out=beats)
            word.view(torch.int8).copy_(beats)
            word &= ones >> 8 * d  # both in one run
            rank -= word
            rank += word << 8 * d
        kept = mask[start : start + chunk.numel()].view(torch.int8)
        torch.lt(rank.view(torch.int8)[: chunk.numel()], n, out=kept)
    return mask.view(scores.shape)


def joint_keep_counts(
    scores: Sequence[Tensor],
    keep: int,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> list[int]:
    """How many elements of each tensor survive one threshold over all of them.

    Ties at the threshold are given to the tensors in order. The counts add up to `keep` (over
    all ranks, when `reduce` sums over ranks; ties then belong to this rank's tensors as they come).
    """
    flats = [s.reshape(-1) for s in scores]
    eligible = sum(check_scores(f) for f in flats)
    total = sum(f.numel() for f in flats)
    if reduce is None:
        _check_keep(keep, total, eligible, "global budget")
    if keep == 0:
        return [0] * len(flats)
    key, ties = radix_threshold(flats, keep, reduce)
    counts = []
    for flat in flats:
        above = equal = 0
        for chunk in _chunks(flat):
            keys = _ordered_keys(chunk)
            above += int((keys > key).sum())
            equal += int((keys == key).sum())
        taken = min(ties, equal)
        ties -= taken
        counts.append(above + taken)
    return counts


def _check_keep(keep: int, units: int, eligible: int, where: str) -> None:
    if not 0 <= keep <= units:
        raise InvalidArgument(f"{where}: keep={keep} is not between 0 and {units}")
    if keep > eligible:
        raise InvalidArgument(
            f"{where}: {keep} units must be kept but only {eligible} are eligible "
            "(the others are already masked: score -inf); ask for a higher sparsity"
        )
