"""Which rows should share their columns: order rows so that groups of G retain the most score.

With the row scores S `[n, columns]` in groups g of G rows, P_gc = sum_{r in g} S_rc is the score of
a unit, and keeping the k best units retains

    R = max_{|K| = k} sum_{(g,c) in K} P_gc = min_tau  k tau + sum_gc max(P_gc - tau, 0).

At a fixed tau the second form is a sum over groups, so exchanging rows of two groups changes two
terms only. The search starts from groups filled greedily, each with the rows that raise its term
most (and from rows by their sums and as they are, where there are few). Then all pairs of groups
meet in rounds (every group in one pair a round, as in a tournament) and make their best exchange,
and tau is set anew after every tournament. The order with the largest R is returned; the given one
competes, so R never falls. Nothing is random.

With equally many units for every group the terms are the sums of its k best units; the same form
with a tau for each group ranks the exchanges, and the terms themselves decide.

Several matrices may share one order (layers that meet in a sum): their columns lie side by side,
each matrix with its own tau.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseworks.core.patterns import SharedInputs

__all__ = ["Table", "find_order", "moved", "retained"]

_CHUNK = 1 << 20  # floats of a temporary
_FEW = 256  # slots up to which the search starts from several orders


@dataclass(frozen=True)
class Table:
    """Scores of a matrix, and which of its rows move together.

    Args:
        scores: fp32 `[rows, columns]`, at least 0.
        places: int64 `[slots, m]`, the rows that each slot fills; other rows stay where they are.
        keep: units that will be kept.
    """

    scores: Tensor
    places: Tensor
    keep: int


def moved(table: Table, order: Tensor) -> Table:
    """The table with the rows of slot `order[j]` at the places of slot j."""
    scores = table.scores.clone()
    scores[table.places.flatten()] = table.scores[table.places[order].flatten()]
    return replace(table, scores=scores)


def retained(table: Table, pattern: SharedInputs) -> float:
    """R: the sum of the scores that stay."""
    if not pattern.balanced:
        pooled = pattern.pool(table.scores).flatten()
        return float(pooled.topk(table.keep, sorted=False).values.sum(dtype=torch.float64))
    mask = pattern.select(table.scores, table.keep)
    return float(table.scores[mask].sum(dtype=torch.float64))


def find_order(
    tables: Sequence[Table], pattern: SharedInputs, *, sweeps: int = 8, columns: int = 512
) -> Tensor | None:
    """The order of the slots that retains the most, int64 `[slots]`; None: no better one was found.

    Args:
        tables: matrices whose slots are the same things.
        sweeps: tournaments, at most; they end when one gains less than 0.01 %.
        columns: of all matrices together that the search looks at, evenly chosen; the result is
            judged by all of them.
    """
    bins = _bins(tables, pattern)
    if bins is None:
        return None
    first = _Search(tables, pattern, bins, columns)
    best, most = None, sum(retained(t, pattern) for t in tables)
    starts = [first.filled()]
    if len(bins) <= _FEW:
        starts += [first.order, first.sorted()]
    for order in starts:
        last = -1.0
        for _ in range(sweeps):
            order = _Search(tables, pattern, bins, columns, order).tournament()
            now = sum(retained(moved(t, order), pattern) for t in tables)
            if now > most * (1 + 1e-9):
                best, most = order, now
            if now < last * (1 + 1e-4):
                break
            last = now
    return best


def _bins(tables: Sequence[Table], pattern: SharedInputs) -> Tensor | None:
    """The bin of each slot, `[slots]`: the division into groups that most of the columns have."""
    columns: dict[tuple[int, ...], int] = {}
    for table in tables:
        for blocks in (table.places // pattern.size).T:
            key = tuple(torch.unique(blocks, return_inverse=True)[1].tolist())
            columns[key] = columns.get(key, 0) + table.scores.shape[1]
    useful = [k for k in columns if 1 < max(k) + 1 < len(k)]
    return torch.tensor(max(useful, key=columns.__getitem__)) if useful else None


class _Search:
    """Rows of all slots side by side, and the terms of the bins at fixed thresholds.

    A set is the rows of a matrix that lie in one group for every bin. Matrices that divide slots
    in another way (shifted against the others) do not take part.
    """

    def __init__(
        self, tables: Sequence[Table], pattern: SharedInputs, bins: Tensor, columns: int,
        order: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.bins, self.count = bins, int(bins.max()) + 1
        self.order = torch.arange(len(bins)) if order is None else order.clone()
        rows, base, edges = [], [], []
        self.each: list[tuple[int, int]] = []  # columns and units that a balanced group keeps
        width = sum(t.scores.shape[1] * t.places.shape[1] for t in tables)
        for table in tables:
            pooled = pattern.pool(moved(table, self.order).scores)
            edge = _edges(pooled, table.keep, pattern.balanced)
            step = max(1.0, width / columns)
            chosen = torch.arange(0, pooled.shape[1], step).long()
            for parts, block in _sets(table.places // pattern.size, bins, self.count):
                mine = table.scores[table.places[:, parts]][..., chosen].sum(1)
                rows.append(mine)
                filled = mine.new_zeros(self.count, len(chosen))
                filled.index_add_(0, bins, mine[self.order])
                base.append(pooled[block][:, chosen] - filled)
                edges.append(edge[block][:, None].expand(-1, len(chosen)))
                if pattern.balanced:
                    part = round(table.keep / len(pooled) * len(chosen) / pooled.shape[1])
                    self.each.append((len(chosen), max(1, part)))
        self.rows = torch.cat(rows, 1)
        self.base, self.edges = torch.cat(base, 1), torch.cat(edges, 1)
        size = int(torch.bincount(bins).max())
        self.members = torch.full((self.count, size), -1)  # places of each bin
        for b in range(self.count):
            inside = (bins == b).nonzero().flatten()
            self.members[b, : len(inside)] = inside

    def filled(self) -> Tensor:
        """An order made greedily, bin by bin; a bin that is half full is held to half its tau."""
        free = torch.ones(len(self.bins), dtype=torch.bool)
        order = torch.empty_like(self.order)
        for b in range(self.count):
            inside = self.members[b][self.members[b] >= 0]
            sums = self.base[b]
            for filled, place in enumerate(inside.tolist(), 1):
                left = free.nonzero().flatten()
                edge = self.edges[b] * (filled / len(inside))
                gains = _gains(self.rows[left], sums - edge)
                pick = int(left[gains.argmax()])
                order[place], free[pick] = pick, False
                sums = sums + self.rows[pick]
        return order

    def sorted(self) -> Tensor:
        """The slots with the largest sums in one bin, and so on."""
        order = torch.empty_like(self.order)
        order[self.bins.argsort(stable=True)] = self.rows.sum(1).argsort(
            descending=True, stable=True
        )
        return order

    def tournament(self) -> Tensor:
        """Every bin makes its best exchange with every other once."""
        sums = self.base.clone().index_add_(0, self.bins, self.rows[self.order])
        seats = list(range(self.count + self.count % 2))
        for _ in range(len(seats) - 1):
            half = len(seats) // 2
            pairs = [(a, b) for a, b in zip(seats[:half], seats[:half - 1:-1])
                     if max(a, b) < self.count]  # fmt: skip
            self._meet(sums, torch.tensor(pairs))
            seats = [seats[0], seats[-1], *seats[1:-1]]
        return self.order

    def _meet(self, sums: Tensor, pairs: Tensor) -> None:
        size, width = self.members.shape[1], self.rows.shape[1]
        for part in torch.split(pairs, max(1, _CHUNK // (size * size * width))):
            a, b = part[:, 0], part[:, 1]
            here, there = self.members[a], self.members[b]
            mine, other = self.rows[self.order[here]], self.rows[self.order[there]]
            change = other[:, None] - mine[:, :, None]
            before = _term(sums[a] - self.edges[a]) + _term(sums[b] - self.edges[b])
            after = _term((sums[a] - self.edges[a])[:, None, None] + change)
            after += _term((sums[b] - self.edges[b])[:, None, None] - change)
            after.masked_fill_((here < 0)[:, :, None] | (there < 0)[:, None, :], -torch.inf)
            gain, where = (after.flatten(1) - before[:, None]).max(1)
            worth = gain > 1e-6 * before
            if self.each:  # each group has its own tau, which moves with its rows
                step = change.flatten(1, 2)[torch.arange(len(a)), where]
                worth &= self._top(sums[a] + step) + self._top(sums[b] - step) > (
                    self._top(sums[a]) + self._top(sums[b])
                ) * (1 + 1e-6)
            for k in worth.nonzero().flatten().tolist():
                i, j = divmod(int(where[k]), size)
                p, q = int(here[k, i]), int(there[k, j])
                self.order[p], self.order[q] = self.order[q].item(), self.order[p].item()
                sums[a[k]] += change[k, i, j]
                sums[b[k]] -= change[k, i, j]

    def _top(self, sums: Tensor) -> Tensor:
        """What a balanced group retains."""
        widths = [w for w, _ in self.each]
        parts = zip(torch.split(sums, widths, 1), self.each)
        return torch.stack([p.topk(k, 1).values.sum(1) for p, (_, k) in parts]).sum(0)


def _term(over: Tensor) -> Tensor:
    return over.clamp_min(0).sum(-1)


def _gains(rows: Tensor, over: Tensor) -> Tensor:
    parts = torch.split(rows, max(1, _CHUNK // rows.shape[1]))
    return torch.cat([_term(part + over) for part in parts])


def _edges(pooled: Tensor, keep: int, balanced: bool) -> Tensor:
    """tau of every group, `[groups]`: the score of the last unit that is kept."""
    if balanced:
        each = min(max(1, round(keep / len(pooled))), pooled.shape[1])
        return pooled.kthvalue(pooled.shape[1] - each + 1, dim=1).values
    last = pooled.flatten().kthvalue(pooled.numel() - max(1, keep) + 1).values
    return last.expand(len(pooled))


def _sets(blocks: Tensor, bins: Tensor, count: int) -> Iterator[tuple[list[int], Tensor]]:
    """Columns of `blocks` `[slots, m]` that are equal, with the group of each bin."""
    left = list(range(blocks.shape[1]))
    while left:
        parts = [k for k in left if bool((blocks[:, k] == blocks[:, left[0]]).all())]
        left = [k for k in left if k not in parts]
        block = torch.empty(count, dtype=torch.int64)
        block[bins] = blocks[:, parts[0]]
        if bool((block[bins] == blocks[:, parts[0]]).all()) and len(torch.unique(block)) == count:
            yield parts, block
