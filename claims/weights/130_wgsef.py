"""The k-level group envelope against group lasso: support recovery, and a digits network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.data.images import digits
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.models.coupling import trace
from sparseworks.weights.structured.wgsef import group_norms, proximal_scale, shrink

GROUPS, SIZE, TRUE = 50, 4, 5


def _solve(x: Tensor, y: Tensor, scale: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Proximal gradient for 1/(2n) ||xw - y||^2 + penalty, `[groups, size]`."""
    n = len(x)
    step = float(n / torch.linalg.matrix_norm(x, 2) ** 2)
    w = torch.zeros(GROUPS, SIZE, dtype=torch.float64)
    for _ in range(500):
        gradient = x.T @ (x @ w.flatten() - y) / n
        v = w - step * gradient.view(GROUPS, SIZE)
        w = v * scale(v.norm(dim=1), step)[:, None]
    return w


def _lasso(strength: float) -> Callable[[Tensor, float], Tensor]:
    return lambda norms, step: (1 - step * strength / norms.clamp_min(1e-12)).clamp_min(0)


def _ours(strength: float) -> Callable[[Tensor, float], Tensor]:
    return lambda norms, step: proximal_scale(norms, TRUE, step * strength)


def _regression(seed: int) -> dict[str, float]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, GROUPS * SIZE, generator=g, dtype=torch.float64)
    truth = torch.zeros(GROUPS, SIZE, dtype=torch.float64)
    chosen = torch.randperm(GROUPS, generator=g)[:TRUE]
    truth[chosen] = torch.randn(TRUE, SIZE, generator=g, dtype=torch.float64)
    y = x @ truth.flatten() + torch.randn(200, generator=g, dtype=torch.float64)
    train = slice(0, 200)

    def f1(w: Tensor) -> float:
        found = w.norm(dim=1) > 0
        hits = int(found[chosen].sum())
        return 2 * hits / (int(found.sum()) + TRUE)

    def bias(w: Tensor) -> float:
        return float((truth - w)[chosen].norm() / truth.norm())

    for strength in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0):  # the least that reaches the level
        ours = _solve(x[train], y[train], _ours(strength))
        count = int((ours.norm(dim=1) > 0).sum())
        if count <= TRUE:
            break
    low, high = 0.0, 10.0
    for _ in range(24):  # group lasso at the same number of groups
        middle = (low + high) / 2
        many = int((_solve(x[train], y[train], _lasso(middle)).norm(dim=1) > 0).sum()) > count
        low, high = (middle, high) if many else (low, middle)
    lasso = _solve(x[train], y[train], _lasso(high))
    return {
        "groups found": float(count),
        "recovery gain": f1(ours) - f1(lasso),
        "bias gain": bias(lasso) - bias(ours),
        "recovery F1": f1(ours),
        "lasso recovery F1": f1(lasso),
    }


def _train(seed: int, kind: str, strength: float, k: int) -> tuple[float, int]:
    """Digits: 64-64-10; returns test accuracy in percent and hidden units that stay."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    data = digits()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1300], order[1300:]
    coupling = trace(model, data.normalized(test[:2]))
    family = coupling.families[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    g = torch.Generator().manual_seed(seed)
    for _ in range(40):
        for index in torch.randperm(len(train), generator=g).split(65):
            picked = train[index]
            loss = F.cross_entropy(model(data.normalized(picked)), data.labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if kind == "wgsef":
                shrink(model, coupling, family, k, 0.05 * strength)
            elif kind == "lasso":
                norms = group_norms(model, coupling, family)
                factor = (1 - 0.05 * strength / norms.clamp_min(1e-12)).clamp_min(0).float()
                with torch.no_grad():
                    model[1].weight.mul_(factor[:, None])
                    model[1].bias.mul_(factor)
    with torch.no_grad():
        guess = model(data.normalized(test)).argmax(1)
    accuracy = float((guess == data.labels[test]).float().mean()) * 100
    return accuracy, int((group_norms(model, coupling, family) > 0).sum())


def _digits(seed: int) -> dict[str, float]:
    k = 19
    dense, _ = _train(seed, "dense", 0.0, k)
    for strength in (0.1, 0.2, 0.4, 0.8):
        ours, left = _train(seed, "wgsef", strength, k)
        if left <= 1.05 * k:
            break
    low, high, lasso, count = 0.0, 0.2, 0.0, 64
    for _ in range(7):  # group lasso tuned to at most as many units
        middle = (low + high) / 2
        accuracy, many = _train(seed, "lasso", middle, k)
        if many > left:
            low = middle
        else:
            high, lasso, count = middle, accuracy, many
    return {
        "dense accuracy": dense,
        "accuracy": ours,
        "lasso accuracy": lasso,
        "units": float(left),
        "lasso units": float(count),
        "level reached": 1.05 * k - left,
        "accuracy over lasso": ours - lasso,
        "within a point of dense": ours - dense + 1.0,
    }


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    return {**_regression(seed), **_digits(seed)}


CLAIM = Claim(
    card="130",
    method="wgsef",
    title="the group envelope reaches a chosen number of groups, with less loss than group lasso",
    model="50 groups of 4 coefficients, 5 true; a 64-64-10 network",
    data="Gaussian regression with noise 1, 200 samples; scikit-learn's digits",
    baseline="group lasso tuned to the same number of groups",
    metric="F1 of the support; relative error on the true groups; test accuracy",
    promises=(
        Promise("recovery gain", "support F1 above group lasso's at equal sparsity"),
        Promise("bias gain", "relative error on the true groups below group lasso's"),
        Promise("level reached", "at most 1.05 k hidden units non-zero, without a threshold"),
        Promise("accuracy over lasso", "accuracy above group lasso's at equal units (points)"),
        Promise("within a point of dense", "accuracy at 30 % of the units within 1 point of dense"),
    ),
    measure=measure,
)
