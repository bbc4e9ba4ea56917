"""The column solver against the paper's formulas written plainly, and its exact identities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.errors import ModelError, PatternError
from sparseworks.core.patterns import NM, Block, Group, Unstructured
from sparseworks.weights.oneshot.obs import (
    column_solve,
    energy,
    prepare_hessian,
    row_grid,
    upper_factor,
)
from sparseworks.weights.oneshot.refit import refit_rows


def problem(rows, columns, seed=0, dtype=torch.float32, dead=()):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=g, dtype=torch.float64)
    x = x @ (torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=g)).double()
    x[:, list(dead)] = 0
    w = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return w.to(dtype), (2 / 3 * x.t() @ x).to(dtype)


def plain(w, h, damping, block, choose):
    """Card-style OBS in fp64: H^-1 by inversion, one column at a time, no lazy updates."""
    w, h = w.double().clone(), h.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    loss = 0.0
    mask = torch.ones(w.shape, dtype=torch.bool)
    remaining = torch.arange(len(h))
    for j in range(len(h)):
        # the inverse of the Hessian restricted to the columns not yet eliminated
        inverse = torch.linalg.inv(h[j:, j:])
        if (found := choose(w, h, j)) is not None:
            start, stop, chosen = found
            mask[:, start:stop] = chosen
        removed = torch.where(mask[:, j], 0.0, w[:, j])
        loss += float((removed**2 / inverse[0, 0]).sum()) / 2
        w[:, j:] -= (removed / inverse[0, 0])[:, None] * inverse[0][None, :]
        w[:, j] = torch.where(mask[:, j], w[:, j], 0.0)
    del remaining
    return w, mask, loss


def saliency(w, h, start, stop):
    """w_j^2 / U_jj^2, where U_jj^2 is the corner of the inverse of the trailing Hessian."""
    corner = [torch.linalg.inv(h[j:, j:])[0, 0] for j in range(start, stop)]
    return w[:, start:stop] ** 2 / torch.stack(corner)


@pytest.mark.parametrize("size,block", [(24, 8), (40, 128), (36, 12)])
@pytest.mark.parametrize("dead", [(), (3, 17)])
def test_unstructured_equals_the_plain_algorithm(size, block, dead):
    w, h = problem(10, size, dead=dead)
    keep = w.numel() // 2

    def choose(now, damped, j):
        if j % min(block, size):
            return None
        stop = min(j + min(block, size), size)
        score = saliency(now, damped, j, stop).float()
        dropped = 5 * (stop - j)  # half of 10 rows
        order = torch.sort(score.flatten(), stable=True).indices
        chosen = torch.ones(score.numel(), dtype=torch.bool)
        chosen[order[:dropped]] = False
        return j, stop, chosen.view(score.shape)

    expected, mask, loss = plain(w, h, 0.01, block, choose)
    damped, gone = prepare_hessian(h, 0.01)
    got, got_mask, got_loss = column_solve(
        torch.where(gone, 0.0, w), upper_factor(damped), Unstructured(), keep, block=block
    )
    assert torch.equal(got_mask, mask) and int(got_mask.sum()) == keep
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)
    assert got_loss == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (4, 8), (2, 3)])
def test_nm_equals_the_plain_algorithm(n, m):
    w, h = problem(6, 24, seed=3)

    def choose(now, damped, j):
        if j % m:
            return None
        return j, j + m, NM(n, m).select(saliency(now, damped, j, j + m).float())

    expected, mask, loss = plain(w, h, 0.01, m, choose)
    damped, _ = prepare_hessian(h, 0.01)
    pattern = NM(n, m)
    got, got_mask, got_loss = column_solve(
        w, upper_factor(damped), pattern, pattern.keep(w.shape, 0), block=16
    )
    assert torch.equal(got_mask, mask)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)
    assert got_loss == pytest.approx(loss, rel=1e-3)


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 99), st.sampled_from([1, 8, 32, 128]))
@settings(max_examples=60, deadline=None)
def test_loss_is_the_quadratic_form_of_the_change(rows, columns, percent, block):
    w, h = problem(rows, columns, seed=percent)
    pattern = Unstructured()
    keep = pattern.keep(w.shape, percent / 100)
    damped, _ = prepare_hessian(h, 0.01)
    new, mask, loss = column_solve(w, upper_factor(damped), pattern, keep, block=block)
    change = (w - new).double()
    exact = float(((change @ damped.double()) * change).sum()) / 2
    assert loss == pytest.approx(exact, rel=1e-2, abs=1e-4)
    assert int(mask.sum()) == keep
    assert bool((new[~mask] == 0).all())


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_every_pattern_keeps_exactly_what_is_asked(data):
    pattern = data.draw(st.sampled_from([Unstructured("row"), Block(2, 4), Block(3, 2)]))
    w, h = problem(6, 24, seed=data.draw(st.integers(0, 99)))
    keep = pattern.keep(w.shape, data.draw(st.integers(0, 99)) / 100)
    damped, _ = prepare_hessian(h, 0.01)
    new, mask, _ = column_solve(w, upper_factor(damped), pattern, keep, block=10)
    if isinstance(pattern, Block):
        blocks = mask.view(6 // pattern.h, pattern.h, 24 // pattern.w, pattern.w)
        assert torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))
        assert int(blocks.all(3).all(1).sum()) == keep
    else:
        assert mask.sum(1).tolist() == [keep // 6] * 6
    assert bool((new[~mask] == 0).all())


@pytest.mark.parametrize("options", [{}, {"block": 24}, {"quantize": lambda c: c.round()}])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_the_change_in_place_of_the_weight_alters_nothing(pattern, options):
    w, h = problem(12, 96, seed=1)
    keep = pattern.keep(w.shape, 0.5)
    factor = upper_factor(prepare_hessian(h, 0.01)[0])
    before = w.clone()
    new, mask, loss = column_solve(w, factor, pattern, keep, **options)
    assert torch.equal(w, before)
    for weight in (w, before.t().contiguous().t()):
        again = column_solve(weight, factor, pattern, keep, overwrite=True, **options)
        assert torch.equal(again[1], mask) and again[2] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(again[0], new, rtol=1e-4, atol=1e-5)


def test_masked_before_stays_masked():
    w, h = problem(8, 32)
    allowed = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) < 0.7
    damped, _ = prepare_hessian(h, 0.01)
    new, mask, _ = column_solve(
        w * allowed, upper_factor(damped), Unstructured(), 128, allowed=allowed
    )
    assert not bool((mask & ~allowed).any()) and not bool((new[~allowed] != 0).any())


@given(st.integers(1, 600))
@settings(max_examples=15, deadline=None)
def test_the_factor_is_upper_and_its_product_the_hessian(size):
    _, h = problem(1, size, seed=size, dtype=torch.float64)
    h, _ = prepare_hessian(h, 0.01)
    factor = upper_factor(h)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.t(), h, atol=1e-8, rtol=1e-8)


def test_misuse_is_refused():
    with pytest.raises(ModelError, match="positive definite"):
        upper_factor(-torch.eye(4))
    with pytest.raises(PatternError, match="column by column"):
        column_solve(torch.ones(4, 4), torch.eye(4), Group("rows"), 2)


def test_quantisation_lands_on_the_grid_and_beats_rounding_afterwards():
    w, h = problem(16, 64, seed=5)
    damped, _ = prepare_hessian(h, 0.01)
    factor = upper_factor(damped)
    grid = row_grid(w, 4)
    joint, mask, _ = column_solve(w, factor, Unstructured(), 512, quantize=grid)
    plain_, mask2, _ = column_solve(w, factor, Unstructured(), 512)
    after = torch.stack([grid(c) for c in plain_.t()], 1) * mask2
    levels = [len(set(row.tolist())) for row in joint]
    assert max(levels) <= 16 and bool((joint[~mask] == 0).all())

    def error(new):
        return float((((w - new) @ damped) * (w - new)).sum())

    assert error(joint) < error(after)


@given(st.integers(1, 6), st.integers(2, 24), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_refit_is_least_squares_on_the_kept_weights(rows, columns, seed):
    w, h = problem(rows, columns, seed=seed, dtype=torch.float64)
    h, _ = prepare_hessian(h, 0.05)
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    got = refit_rows(w, mask, h, tolerance=1e-10)
    for r in range(rows):
        kept = mask[r].nonzero().view(-1)
        exact = torch.zeros(columns, dtype=torch.float64)
        if len(kept):
            exact[kept] = torch.linalg.solve(h[kept][:, kept], (h @ w[r])[kept])
        torch.testing.assert_close(got[r], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [7, 512, 1300])
def test_energy_is_the_loss_of_removing_everything(columns):
    g = torch.Generator().manual_seed(columns)
    w, x = torch.randn(9, columns, generator=g), torch.randn(40, columns, generator=g)
    found = energy(w, x.t() @ x)
    assert found == pytest.approx(float((x.double() @ w.double().t()).square().sum()) / 2, rel=1e-4)


@pytest.mark.parametrize("size", [5, 256, 257, 700])
def test_the_factor_in_place_is_the_same_to_the_bit(size):
    g = torch.Generator().manual_seed(size)
    x = torch.randn(2 * size, size, generator=g)
    hessian, _ = prepare_hessian(x.t() @ x, 0.01)
    hessian = (hessian + hessian.t()) / 2
    before = hessian.clone()
    factor = upper_factor(hessian)
    assert torch.equal(hessian, before)
    place = hessian.data_ptr()
    again = upper_factor(hessian, overwrite=True)
    assert again.data_ptr() == place and torch.equal(again, factor)
    product = factor.double() @ factor.double().t()
    torch.testing.assert_close(product, before.double(), rtol=1e-4, atol=1e-3)
    assert bool((factor.tril(-1) == 0).all())
