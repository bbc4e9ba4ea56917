"""The recommenders against plain dense formulas."""

import copy

import pytest
import torch

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.zoo.recommenders import LightGCN, MatrixFactorization, bpr_loss, recall

PAIRS = torch.tensor([[0, 0], [0, 2], [1, 2], [2, 1], [2, 2], [0, 0]])  # user 3, item 3: nothing


def test_lightgcn_is_the_mean_of_dense_powers_of_the_normalised_adjacency():
    torch.manual_seed(0)
    model = copy.deepcopy(LightGCN(PAIRS, 4, 4, dim=5, layers=3)).double()
    a = torch.zeros(8, 8, dtype=torch.float64)
    for u, i in PAIRS.tolist():
        a[u, 4 + i] = a[4 + i, u] = 1
    degree = a.sum(1)
    d = torch.where(degree > 0, degree.clamp_min(1).rsqrt(), 0)
    step = d[:, None] * a * d
    e = model.table.weight
    final = sum(torch.matrix_power(step, k) @ e for k in range(4)) / 4
    users, items = model.vectors()
    torch.testing.assert_close(torch.cat([users, items]), final, rtol=1e-6, atol=1e-7)
    weight = torch.randn(8, 5, dtype=torch.float64)
    (ours,) = torch.autograd.grad((torch.cat([users, items]) * weight).sum(), e)
    (dense,) = torch.autograd.grad((final * weight).sum(), e)
    torch.testing.assert_close(ours, dense, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["mf", "lightgcn"])
def test_bpr_loss_is_its_formula(kind):
    torch.manual_seed(1)
    model = MatrixFactorization(4, 4, 3) if kind == "mf" else LightGCN(PAIRS, 4, 4, 3)
    u, i, j = torch.tensor([0, 2, 2]), torch.tensor([0, 1, 2]), torch.tensor([1, 3, 0])
    p, q = model.vectors()
    raw_p, raw_q = (p, q) if kind == "mf" else model.table.weight.split([4, 4])
    total = torch.zeros(())
    for k in range(3):
        gap = model(u[k : k + 1], j[k : k + 1]) - model(u[k : k + 1], i[k : k + 1])
        norm = raw_p[u[k]].norm() ** 2 + raw_q[i[k]].norm() ** 2 + raw_q[j[k]].norm() ** 2
        total = total + torch.log1p(gap.exp()).sum() + 0.1 * norm / 2
    torch.testing.assert_close(bpr_loss(model, u, i, j, 0.1), total / 3)


def test_recall_counts_hits_of_unseen_items():
    model = MatrixFactorization(3, 4, 1)
    with torch.no_grad():
        model.users.weight.fill_(1.0)
        model.items.weight.copy_(torch.tensor([[4.0], [3.0], [2.0], [1.0]]))
    seen = torch.tensor([[0, 0]])
    held = torch.tensor([[0, 1], [0, 3], [1, 0], [1, 1]])
    # user 0: best two unseen are 1, 2, one of its two; user 1: 0, 1, both; user 2 holds nothing
    assert recall(model, seen, held, at=2) == pytest.approx((0.5 + 1.0) / 2)


@pytest.mark.parametrize("pairs", [torch.tensor([[4, 0]]), torch.tensor([[0, -1]]), PAIRS[:0]])
def test_interactions_outside_the_tables_are_refused(pairs):
    with pytest.raises(InvalidArgument, match="interactions"):
        LightGCN(pairs, 4, 4)
