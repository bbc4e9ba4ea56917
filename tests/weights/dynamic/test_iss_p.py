"""ISS-P: the update against a plain sort, the derived equilibrium, the laws of a soft method."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.dynamic.iss_p import shrinkage_left

STEPS, LAST = 20, 12
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 0.01, betas=(0.9, 0.99)),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip


def train(model, optimizer, first=0, last=STEPS, after=lambda: None):
    for i in range(first, last):
        g = torch.Generator().manual_seed(i)
        x, y = torch.randn(8, 4, 8, 8, generator=g), torch.randint(0, 5, (8,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()


def start(optimizer="adam", sparsity=0.8, model=None, **options):
    model = net() if model is None else model
    made = OPTIMIZERS[optimizer](model.parameters())
    run = sw.sparsify(
        model, made, "iss-p", sparsity=sparsity, steps=STEPS, end=LAST / STEPS, **options
    )
    return model, made, run


@pytest.mark.parametrize("shrink", [0.95, 0.5, 0.0, 1.0])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_equals_a_plain_loop_that_sorts_every_layer(optimizer, shrink):
    """The oracle: its own sort, its own shrinkage, its own masking; no code of the method."""
    model, made, run = start(optimizer, shrink=shrink)
    twin = net()
    other = OPTIMIZERS[optimizer](twin.parameters())
    weights = [twin[0].weight, twin[2].weight, twin[5].weight]
    dropped = {}
    count = {"steps": 0}

    def shrink_or_mask():
        count["steps"] += 1
        with torch.no_grad():
            for i, w in enumerate(weights):
                if count["steps"] <= LAST:
                    smallest = w.abs().flatten().argsort()[: int(0.8 * w.numel() + 1e-9)]
                    dropped[i] = smallest
                if count["steps"] < LAST:
                    w.view(-1)[smallest] *= shrink
                else:
                    w.view(-1)[dropped[i]] = 0
                    for value in other.state[w].values():
                        if value.shape == w.shape:
                            value.view(-1)[dropped[i]] = 0

    assert set(run.masks) == {"0.weight", "2.weight", "5.weight"}
    train(model, made)
    train(twin, other, after=shrink_or_mask)
    run.finish()
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_soft_until_the_cut_then_exact(optimizer):
    model, made, run = start(optimizer)

    def check():
        assert run.current_sparsity == pytest.approx(0.8 if run.step >= LAST else 0, abs=2e-3)
        for name, weight in run.parameters.items():
            zeros = int((weight == 0).sum())
            assert zeros == (int((~run.masks[name]).sum()) if run.step >= LAST else 0)

    train(model, made, after=check)
    record = run.finish()
    for mask in record.values():
        assert int((~mask).sum()) == int(0.8 * mask.numel() + 1e-9)
    assert sw.masks(model).violations(model) == {}


def test_a_weight_pushed_at_full_step_settles_where_the_formula_says():
    a, lr = 0.95, 1e-3
    layer = nn.Sequential(nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        layer[0].weight.fill_(1.0)
        layer[0].weight[:9] = 1e-4
    optimizer = torch.optim.SGD(layer.parameters(), lr)
    run = sw.sparsify(
        layer, optimizer, "iss-p", sparsity=0.9, steps=1000, shrink=a, end=1.0, include="*"
    )
    for _ in range(600):
        optimizer.zero_grad()
        (-layer[0].weight.sum()).backward()  # every weight is pushed up by lr a step
        optimizer.step()
    small = layer[0].weight.detach()[:9]
    torch.testing.assert_close(small, torch.full_like(small, a * lr / (1 - a)))
    big = layer[0].weight.detach()[9]
    expected = (90 * small[0, 0] ** 2 / (90 * small[0, 0] ** 2 + 10 * big[0] ** 2)).sqrt()
    assert shrinkage_left(run) == pytest.approx(float(expected), rel=1e-5)


def test_the_unimportant_set_can_still_change():
    """A weight outside the target's support at the start is in the mask at the end."""
    model, made, run = start("adam")
    first = {n: p.detach().abs().clone() for n, p in run.parameters.items()}
    train(model, made)
    back = 0
    for name, mask in run.finish().items():
        rank = first[name].flatten().argsort().argsort().view_as(mask)
        back += int((mask & (rank < int(0.8 * mask.numel()))).sum())
    assert back > 0


def test_shrink_one_is_one_shot_magnitude_pruning_at_the_cut():
    model, made, _ = start("adam", shrink=1.0)
    train(model, made, 0, LAST)
    plain = net()
    train(plain, OPTIMIZERS["adam"](plain.parameters()), 0, LAST)
    sw.prune(plain, "magnitude", sparsity=0.8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_sparsity_zero_is_plain_training(optimizer):
    model, made, run = start(optimizer, sparsity=0.0)
    plain = net()
    train(plain, OPTIMIZERS[optimizer](plain.parameters()))
    train(model, made)
    run.finish()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))


@pytest.mark.parametrize("stop", [LAST - 3, LAST + 3])
def test_the_same_run_twice_and_resumed(stop):
    model, made, run = start()
    train(model, made, 0, stop)
    saved = copy.deepcopy((model.state_dict(), made.state_dict(), run.state_dict()))
    train(model, made, stop, STEPS)
    again, made, run = start()
    again.load_state_dict(saved[0])
    made.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    train(again, made, stop, STEPS)
    twice, made, _ = start()
    train(twice, made)
    for a, b, c in zip(model.parameters(), again.parameters(), twice.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_n_m_and_global_budget():
    model, made, run = start(sparsity=0.5, pattern="2:4")
    train(model, made)
    for name, mask in run.finish().items():
        rows = run.views[name].matrix(mask)
        assert bool((rows.view(-1, 4).sum(1) == 2).all())
    model, made, run = start(sparsity=0.5, budget="global")
    train(model, made)
    assert run.finish().sparsity() == pytest.approx(0.5, abs=1e-3)


def test_a_sample_of_everything_is_exact_and_a_small_one_is_near():
    def trained(**options):
        model, made, run = start(**options)
        train(model, made)
        return model, run.finish()

    (whole, _), (same, _) = trained(), trained(sample=10**6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), same.parameters()))
    (near, record), (again, _) = trained(sample=200), trained(sample=200)
    assert all(torch.equal(a, b) for a, b in zip(near.parameters(), again.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(near.parameters(), whole.parameters()))
    for mask in record.values():  # the cut does not estimate
        assert int((~mask).sum()) == int(0.8 * mask.numel() + 1e-9)

    big = nn.Sequential(nn.Linear(300, 200, bias=False))
    before = big[0].weight.detach().clone()
    optimizer = torch.optim.SGD(big.parameters(), 0.0)
    sw.sparsify(big, optimizer, "iss-p", sparsity=0.8, steps=9, sample=4000, include="*")
    optimizer.step()
    shrunk = big[0].weight != before
    assert float(shrunk.float().mean()) == pytest.approx(0.8, abs=0.03)  # 5 standard errors
    assert before.abs()[shrunk].max() < before.abs()[~shrunk].min()


def test_sampling_with_sparsity_zero_is_plain_training():
    model, made, run = start(sparsity=0.0, sample=50)
    plain = net()
    train(plain, OPTIMIZERS["adam"](plain.parameters()))
    train(model, made)
    run.finish()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"shrink": 1.5}, "shrink=1.5"),
        ({"shrink": -0.1}, "shrink=-0.1"),
        ({"end": 0.0}, "end=0"),
        ({"sample": 0}, "sample=0"),
        ({"sample": 9, "pattern": "2:4"}, "ranks single weights"),
        ({"sample": 9, "budget": "global"}, "ranks single weights"),
        ({"end": 0.01}, "before the first step"),
        ({"steps": None}, "give `steps`"),
    ],
)
def test_misuse_changes_nothing(options, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["adam"](model.parameters())
    with pytest.raises(InvalidArgument, match=message):
        sw.sparsify(model, optimizer, "iss-p", **{"sparsity": 0.5, "steps": STEPS, **options})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
