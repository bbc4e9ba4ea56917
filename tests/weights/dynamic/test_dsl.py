"""DSL against a plain loop; embedding tables as what is masked; exploration; resumption."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.models.zoo.recommenders import LightGCN, MatrixFactorization, bpr_loss
from sparseworks.weights.dynamic.dsl import explored

STEPS, USERS, ITEMS = 12, 20, 15
G = torch.Generator().manual_seed(0)
PAIRS = torch.stack([torch.arange(60) % USERS, torch.randint(0, ITEMS, (60,), generator=G)], 1)


def model_of(kind):
    torch.manual_seed(0)
    if kind == "mf":
        return MatrixFactorization(USERS, ITEMS, 6)
    return LightGCN(PAIRS, USERS, ITEMS, 6)


def loss_at(model, step):
    g = torch.Generator().manual_seed(step)
    batch = PAIRS[torch.randint(0, len(PAIRS), (9,), generator=g)]
    return bpr_loss(model, batch[:, 0], batch[:, 1], torch.randint(0, ITEMS, (9,), generator=g))


def train(model, optimizer, first=0, last=STEPS, after=lambda: None):
    for step in range(first, last):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.step()
        after()


def adam(model):
    return torch.optim.Adam(model.parameters(), 0.05)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["mf", "lightgcn"])
def test_masks_and_weights_are_those_of_a_plain_loop(kind, accumulate):
    ours = model_of(kind)
    run = sw.sparsify(
        ours, adam(ours), "dsl", sparsity=0.6, steps=STEPS, every=3, accumulate=accumulate
    )
    masks = {n: m.clone() for n, m in run.masks.items()}
    train(ours, run.optimizer)

    plain = model_of(kind)
    tables = dict(plain.named_parameters())
    with torch.no_grad():
        for n, p in tables.items():
            p.mul_(masks[n])
    first, second = ({n: torch.zeros_like(p) for n, p in tables.items()} for _ in range(2))
    summed = {n: torch.zeros_like(p) for n, p in tables.items()}
    ages = dict.fromkeys(tables, 0)
    for step in range(STEPS):
        plain.zero_grad()
        loss_at(plain, step).backward()
        for n, p in tables.items():
            if (step // 3 * 3 + 3) - step <= accumulate:
                summed[n] += p.grad
            g = p.grad * masks[n]
            ages[n] += 1
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.999 * second[n] + 0.001 * g * g
            with torch.no_grad():
                top = first[n] / (1 - 0.9 ** ages[n])
                p -= 0.05 * top / ((second[n] / (1 - 0.999 ** ages[n])).sqrt() + 1e-8)
                p *= masks[n]
            if (step + 1) % 3:
                continue
            t = (step + 1) / STEPS
            rate = 0.005 + (0.5 - 0.005) * (1 + math.cos(math.pi * t)) / 2
            active = masks[n].flatten().nonzero().flatten().tolist()
            count = math.ceil(rate * len(active))
            active.sort(key=lambda k: -abs(float(p.detach().flatten()[k])))
            kept = set(active[: len(active) - count])
            rest = [k for k in range(p.numel()) if k not in kept]
            rest.sort(key=lambda k: (-abs(float(summed[n].flatten()[k])), k))
            chosen = kept | set(rest[:count])
            masks[n] = torch.tensor([k in chosen for k in range(p.numel())]).view_as(p)
            summed[n].zero_()
            with torch.no_grad():
                for tensor in (p, first[n], second[n]):
                    tensor *= masks[n]
    for n, p in tables.items():
        assert torch.equal(run.masks[n], masks[n]), n
        torch.testing.assert_close(run.parameters[n].detach(), p.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("growth", ["gradient", "random", "unexplored"])
def test_zeros_are_exact_after_every_step_and_after_finish(growth):
    model = model_of("mf")
    run = sw.sparsify(model, adam(model), "dsl", sparsity=0.7, steps=STEPS, every=2, growth=growth)
    shape = {n: m.numel() - round(0.7 * m.numel()) for n, m in run.masks.items()}
    union = {n: m.clone() for n, m in run.masks.items()}

    def check():
        for n, p in run.parameters.items():
            assert int(run.masks[n].sum()) == shape[n]
            assert bool((p.detach()[~run.masks[n]] == 0).all())
            union[n] |= run.masks[n]

    train(model, run.optimizer, after=check)
    total = sum(m.numel() for m in union.values())
    assert explored(run) == pytest.approx(sum(int(m.sum()) for m in union.values()) / total)
    record = run.finish()
    assert set(record) == {"users.weight", "items.weight"}
    assert sw.masks(model).violations(model) == {}


def test_unexplored_growth_explores_most():
    found = {}
    for growth in ("random", "unexplored"):
        model = model_of("mf")
        run = sw.sparsify(
            model, adam(model), "dsl", sparsity=0.8, steps=STEPS, every=1, growth=growth
        )
        train(model, run.optimizer)
        found[growth] = explored(run)
    assert found["unexplored"] > found["random"] > 0.2


@pytest.mark.parametrize("stop", [5, 6, 7])
def test_resuming_is_exact_also_amid_accumulation(stop):
    def make():
        model = model_of("mf")
        options = {"sparsity": 0.7, "steps": STEPS, "every": 4, "accumulate": 3}
        return model, sw.sparsify(model, adam(model), "dsl", seed=3, **options)

    whole, run = make()
    train(whole, run.optimizer, 0, stop)
    parts = (whole, run.optimizer, run)
    saved = copy.deepcopy([part.state_dict() for part in parts])
    train(whole, run.optimizer, stop, STEPS)
    again, other = make()
    for part, state in zip((again, other.optimizer, other), saved):
        part.load_state_dict(state)
    train(again, other.optimizer, stop, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    assert explored(run) == explored(other)


def test_the_fixed_method_keeps_the_zeros_of_tables():
    model = model_of("mf")
    run = sw.sparsify(model, adam(model), "dsl", sparsity=0.7, steps=STEPS, every=4)
    train(model, run.optimizer)
    masks = run.finish()
    again = sw.sparsify(model, adam(model), "fixed")
    train(model, again.optimizer)
    again.finish()
    for name, mask in masks.items():
        assert torch.equal(again.masks[name], mask)
        assert bool((again.parameters[name].detach()[~mask] == 0).all())


def test_misuse_is_refused_before_anything_changes():
    model = model_of("mf")
    before = copy.deepcopy(model.state_dict())
    for options, message in (
        ({"accumulate": 5, "every": 4}, "accumulate"),
        ({"accumulate": 5, "steps": 40}, "larger `every`"),  # the default is 2
        ({"growth": "magic"}, "growth"),
        ({"rate": 2.0}, "rate"),
        ({"steps": None}, "give `steps`"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            sw.sparsify(model, adam(model), "dsl", **{"sparsity": 0.5, "steps": 9, **options})
    model.users.sparse = True
    with pytest.raises(InvalidArgument, match="sparse gradients"):
        sw.sparsify(model, adam(model), "dsl", sparsity=0.5, steps=9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
