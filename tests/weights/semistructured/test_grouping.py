"""The order of the rows: against every possible grouping where there are few, and its laws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.patterns import SharedInputs
from sparseworks.weights.semistructured.grouping import Table, find_order, moved, retained


def groupings(rows: list[int], size: int) -> Iterator[list[int]]:
    """Every way to put rows into groups, once, as an order."""
    if not rows:
        yield []
    for others in itertools.combinations(rows[1:], size - 1):
        left = [r for r in rows[1:] if r not in others]
        for rest in groupings(left, size):
            yield [rows[0], *others, *rest]


def plain(scores: torch.Tensor, order: list[int], size: int, keep: int, balanced: bool) -> float:
    """What is kept, from the definition: sums of columns of groups, the largest of them."""
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    sums = [scores[g].double().sum(0).tolist() for g in groups]
    if not balanced:
        return sum(sorted(itertools.chain(*sums), reverse=True)[:keep])
    each, rest = divmod(keep, len(sums))
    ranked = [sorted(s, reverse=True) for s in sums]
    following = sorted((s[each] for s in ranked), reverse=True) if rest else []
    return sum(sum(s[:each]) for s in ranked) + sum(following[:rest])


def table(scores: torch.Tensor, sparsity: float, size: int) -> Table:
    keep = SharedInputs(size).keep(tuple(scores.shape), sparsity)
    return Table(scores, torch.arange(len(scores))[:, None], keep)


@pytest.mark.parametrize("rows, size", [(8, 4), (8, 2), (9, 3)])
@pytest.mark.parametrize("balanced", [False, True])
def test_near_the_best_of_all_groupings(rows, size, balanced):
    pattern = SharedInputs(size, balanced)
    generator = torch.Generator().manual_seed(rows)
    shares = []
    for _ in range(8):
        scores = torch.rand(rows, 12, generator=generator) ** 2
        scores *= 1 + torch.rand(rows, 1, generator=generator)
        given_ = table(scores, 0.5, size)
        k = given_.keep
        start = plain(scores, list(range(rows)), size, k, balanced)
        assert retained(given_, pattern) == pytest.approx(start, rel=1e-6)
        best = max(plain(scores, o, size, k, balanced) for o in groupings(list(range(rows)), size))
        order = find_order([given_], pattern)
        got = start if order is None else plain(scores, order.tolist(), size, k, balanced)
        assert start <= got * (1 + 1e-7) and got <= best * (1 + 1e-7)
        shares.append((got - start) / (best - start) if best > start * (1 + 1e-7) else 1.0)
    assert sum(shares) / len(shares) > (0.75 if balanced else 0.9)


@pytest.mark.parametrize("balanced", [False, True])
def test_finds_planted_groups(balanced):
    """Rows that use the same half of the inputs, shuffled: nothing need be lost."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, size = 48, 40, 4
    halves = [torch.randperm(columns, generator=generator)[: columns // 2] for _ in range(12)]
    support = torch.zeros(rows, columns)
    for row, kind in enumerate(torch.randperm(rows, generator=generator) % 12):
        support[row, halves[int(kind)]] = 1
    scores = support * (0.5 + torch.rand(rows, columns, generator=generator))
    pattern, planted = SharedInputs(size, balanced), table(scores, 0.5, size)
    order = find_order([planted], pattern)
    assert order is not None
    assert retained(moved(planted, order), pattern) == pytest.approx(float(scores.sum()), rel=1e-6)
    assert retained(planted, pattern) < 0.8 * float(scores.sum())


@st.composite
def problems(draw):
    """One or two matrices whose rows move together, whatever their places are."""
    seed, size = draw(st.integers(0, 10_000)), draw(st.sampled_from([2, 3, 4, 8]))
    slots = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for _ in range(draw(st.integers(1, 2))):
        each, extra = draw(st.integers(1, 2)), draw(st.integers(0, 5))
        rows = slots * each + extra
        layout = draw(st.sampled_from(["runs", "strides", "any"]))
        if layout == "any":
            places = torch.randperm(rows, generator=generator)[: slots * each].view(slots, each)
        else:
            places = torch.arange(extra, rows).view(slots, each)
            if layout == "strides":
                places = torch.arange(extra, rows).view(each, slots).T
        scores = torch.rand(rows, draw(st.integers(1, 9)), generator=generator)
        keep = draw(st.integers(0, SharedInputs(size).units(scores.shape)))
        tables.append(Table(scores, places, keep))
    return tables, SharedInputs(size, draw(st.booleans()))


@given(problems())
@settings(max_examples=80, deadline=None)
def test_an_order_is_a_permutation_and_retains_more(problem):
    tables, pattern = problem
    order = find_order(tables, pattern)
    if order is None:
        return
    assert sorted(order.tolist()) == list(range(len(tables[0].places)))
    after = [moved(t, order) for t in tables]
    for old, new in zip(tables, after):
        rows = list(range(len(old.scores)))
        for j, source in enumerate(order.tolist()):
            for k in range(old.places.shape[1]):
                rows[int(old.places[j, k])] = int(old.places[source, k])
        assert torch.equal(new.scores, old.scores[rows])
    assert sum(retained(t, pattern) for t in after) > sum(retained(t, pattern) for t in tables)
    again = find_order(tables, pattern)
    assert again is not None and torch.equal(order, again)
