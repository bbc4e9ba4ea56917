"""PQ and Gini index against their definitions, and the bound by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.measures import gini_index, pq_bound, pq_index

POWERS = [(0.5, 1.0), (0.1, 1.0), (1.0, 2.0), (0.3, 1.7)]
vectors = st.lists(
    st.one_of(st.floats(-1e3, 1e3), st.floats(-1e-3, 1e-3), st.just(0.0)), min_size=1, max_size=9
)


def norms_formula(w, p, q):
    """1 - d^(1/q - 1/p) ||w||_p / ||w||_q in plain Python."""
    d = len(w)
    low = sum(abs(v) ** p for v in w) ** (1 / p)
    high = sum(abs(v) ** q for v in w) ** (1 / q)
    return 1 - d ** (1 / q - 1 / p) * low / high if high else 0.0


@settings(deadline=None, max_examples=60)
@given(vectors, st.sampled_from(POWERS), st.floats(0.0, 0.5))
def test_index_and_bound_by_brute_force(w, powers, eta):
    p, q = powers
    x = torch.tensor(w, dtype=torch.float64)
    if x.abs().max() < 1e-100:
        assert float(pq_index(x, p=p, q=q)) >= 0
        return
    index = pq_index(x, p=p, q=q)
    assert float(index) == pytest.approx(norms_formula(w, p, q), abs=1e-9)
    assert 0 <= float(index) <= 1 - len(w) ** (1 / q - 1 / p) + 1e-9
    bound = float(pq_bound(index, torch.tensor(len(w)), p=p, q=q, eta=eta))
    largest = sorted((abs(v) ** p for v in w), reverse=True)
    needed = next(
        r for r in range(len(w) + 1) if sum(largest[r:]) <= eta * sum(largest[:r])
    )  # fmt: skip
    assert bound <= needed + 1e-6
    assert bound <= len(w) + 1e-9


@pytest.mark.parametrize("p,q", POWERS)
def test_known_values(p, q):
    assert float(pq_index(torch.full((7,), -3.0), p=p, q=q)) == 0.0
    one_hot = torch.zeros(11)
    one_hot[4] = 0.2
    assert float(pq_index(one_hot, p=p, q=q)) == pytest.approx(1 - 11 ** (1 / q - 1 / p))
    w = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = pq_index(w, p=p, q=q)
    torch.testing.assert_close(pq_index(w * 1e-200, p=p, q=q), index)
    torch.testing.assert_close(pq_index(w * 1e200, p=p, q=q), index)
    torch.testing.assert_close(pq_index(w.repeat(3), p=p, q=q), index)


def test_gaussian_weights_at_the_default_powers():
    """E|w|^(1/2) squared over E|w|: 1 - (2^(1/4) Gamma(3/4) / sqrt(pi))^2 / sqrt(2 / pi)."""
    exact = 1 - (2**0.25 * math.gamma(0.75) / math.pi**0.5) ** 2 / (2 / math.pi) ** 0.5
    assert exact == pytest.approx(0.153, abs=5e-4)
    w = torch.randn(400_000, generator=torch.Generator().manual_seed(1))
    index = pq_index(w)
    assert float(index) == pytest.approx(exact, abs=2e-3)
    # at p = 1/2, q = 1 and eta = 0 the share that may go is the index itself
    share = 1 - pq_bound(index, torch.tensor(w.numel())) / w.numel()
    torch.testing.assert_close(share, index)


def test_only_survivors_count_row_by_row():
    g = torch.Generator().manual_seed(2)
    w, kept = torch.randn(6, 40, generator=g), torch.rand(6, 40, generator=g) < 0.4
    kept[5] = False
    for measure in (pq_index, gini_index):
        found = measure(w, kept)
        for row in range(5):
            torch.testing.assert_close(found[row], measure(w[row][kept[row]]))
        assert float(found[5]) == 0.0
        assert float(measure(torch.zeros(4))) == 0.0
        assert measure(w * kept)[0] > found[0]  # zeros in d would inflate the index


@settings(deadline=None, max_examples=40)
@given(vectors)
def test_gini_is_the_mean_absolute_difference(w):
    size = [abs(v) for v in w]
    if sum(size) < 1e-100:
        return
    differences = sum(abs(a - b) for a in size for b in size)
    expected = differences / (2 * len(w) * sum(size))
    x = torch.tensor(w, dtype=torch.float64)
    assert float(gini_index(x)) == pytest.approx(expected, abs=1e-9)


def test_misuse():
    w = torch.ones(3)
    for p, q in [(1.0, 1.0), (0.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)]:
        with pytest.raises(InvalidArgument, match="0 < p < q"):
            pq_index(w, p=p, q=q)
    with pytest.raises(InvalidArgument, match="NaN"):
        pq_index(torch.tensor([1.0, float("nan")]))
    with pytest.raises(InvalidArgument, match="differ"):
        pq_index(w, torch.ones(2, dtype=torch.bool))
    with pytest.raises(InvalidArgument, match="eta"):
        pq_bound(torch.tensor(0.1), torch.tensor(3), eta=-1.0)
