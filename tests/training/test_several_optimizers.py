"""A model trained by several optimizers: the masks, states and steps are those of one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument

STEPS = 12
METHODS = ["static", "set", "rigl", "granet", "gradual", "iss-p", "dsl"]
KINDS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def halves(model, kind="sgd"):
    return [KINDS[kind](model[:2].parameters()), KINDS[kind](model[2:].parameters())]


def batches(last=STEPS, first=0):
    for i in range(first, last):
        g = torch.Generator().manual_seed(i)
        yield torch.randn(8, 10, generator=g), torch.randint(0, 4, (8,), generator=g)


def train(model, optimizers, after=lambda: None, **span):
    for x, y in batches(**span):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            after()


def begin(model, optimizers, method):
    return sw.sparsify(model, optimizers, method, sparsity=0.7, steps=STEPS)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def same_masks(a, b):
    return all(torch.equal(m, b.masks[n]) for n, m in a.masks.items())


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("method", METHODS)
def test_two_that_step_together_are_one(method, kind):
    one, two = net(), net()
    single, pair = KINDS[kind](one.parameters()), halves(two, kind)
    run, other = begin(one, single, method), begin(two, pair, method)
    for i in range(STEPS):
        train(one, [single], first=i, last=i + 1)
        train(two, pair, first=i, last=i + 1)
        assert run.step == other.step == i + 1
        assert same_masks(run, other) and equal(one, two)
    assert run.dense_steps == other.dense_steps
    other.finish()
    assert sw.masks(two).violations(two) == {}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("method", METHODS)
def test_zeros_hold_after_the_step_of_each_and_what_grows_starts_fresh(method, kind):
    model = net()
    pair = halves(model, kind)
    run = begin(model, pair, method)
    before = {n: m.clone() for n, m in run.masks.items()}

    def check():
        for name, p in run.parameters.items():
            held = [v for o in pair for v in o.state.get(p, {}).values()]
            alike = [p.detach(), *(v for v in held if v.shape == p.shape)]
            fresh = ~before[name]  # masked so far: 0 in all of them, grown now or not
            assert all(bool((v[fresh] == 0).all()) for v in alike)
            before[name] = run.masks[name].clone()

    train(model, pair, check)
    assert run.step == STEPS


def test_a_step_of_the_run_is_over_when_each_has_stepped():
    model = net()
    first, second = halves(model)
    run = begin(model, [first, second], "set")
    for round_ in range(4):
        train(model, [first], first=round_, last=round_ + 3)  # three of one, then one of the other
        assert run.step == round_
        train(model, [second], first=round_, last=round_ + 1)
        assert run.step == round_ + 1


def test_one_that_holds_no_masked_weight_is_not_waited_for():
    model = net()
    body = [p for n, p in model.named_parameters() if n in ("0.weight", "2.weight")]
    rest = [p for n, p in model.named_parameters() if n not in ("0.weight", "2.weight")]
    pair = [KINDS["sgd"](body), KINDS["adamw"](rest)]
    run = begin(model, pair, "rigl")
    train(model, pair[:1])
    assert run.step == STEPS


def test_growth_reads_the_gradient_of_the_own_step_of_each():
    """In turn: the second half's loss leaves gradients in the first half, after its step."""
    model, twin = net(), net()
    first, second = halves(model)
    run = sw.sparsify(model, [first, second], "rigl", sparsity=0.8, steps=10, every=1, fraction=0.2)
    before = {n: m.clone() for n, m in run.masks.items()}
    (x, y), (u, v) = batches(2)
    twin.load_state_dict(model.state_dict())
    nn.functional.cross_entropy(twin(x), y).backward()
    wanted = twin[0].weight.grad.abs()
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    first.step()
    second.zero_grad()
    (100 * nn.functional.cross_entropy(model(u), v)).backward()
    second.step()
    grown = run.masks["0.weight"] & ~before["0.weight"]
    waiting = ~run.masks["0.weight"] & ~before["0.weight"]
    assert run.step == 1 and bool(grown.any())
    assert wanted[grown].min() >= wanted[waiting].max()


@pytest.mark.parametrize("method", ["rigl", "granet", "dsl"])
def test_resuming_between_the_steps_of_two_is_exact(method):
    def turn(model, optimizer, i):
        ((x, y),) = batches(i + 1, i)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    model = net()
    pair = halves(model)
    run = begin(model, pair, method)
    for i in range(5):  # an odd number: the first has stepped, the second has not
        turn(model, pair[i % 2], i)
    saved = copy.deepcopy((model.state_dict(), [o.state_dict() for o in pair], run.state_dict()))
    again = net()
    others = halves(again)
    resumed = begin(again, others, method)
    again.load_state_dict(saved[0])
    for optimizer, state in zip(others, saved[1]):
        optimizer.load_state_dict(state)
    resumed.load_state_dict(saved[2])
    for i in range(5, 2 * STEPS):
        turn(model, pair[i % 2], i)
        turn(again, others[i % 2], i)
        assert run.step == resumed.step == (i + 1) // 2
        assert same_masks(run, resumed) and equal(model, again)


def test_misuse_is_refused_before_anything_changes():
    model = net()
    before = copy.deepcopy(model.state_dict())
    pair = halves(model)

    class FP16_Optimizer(torch.optim.SGD):
        pass

    def refused(message, optimizers):
        with pytest.raises(InvalidArgument, match=message):
            begin(model, optimizers, "rigl")

    refused("does not hold '2.weight'", pair[:1])
    refused("does not hold '2.weight'", pair[0])
    refused("do not hold '0.weight'", [pair[1], KINDS["sgd"](net().parameters())])
    refused("0 optimizers were given", [])
    refused("2 optimizers were given, 1 of them different", [pair[0], pair[0]])
    refused("flattened", [pair[0], FP16_Optimizer(model[2:].parameters(), 0.1)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_optimizers_come_out_of_their_wrappers():
    class LightningOptimizer:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = net()
    pair = halves(model)
    run = begin(model, [LightningOptimizer(o) for o in pair], "set")
    assert run.optimizers == tuple(pair)
    train(model, pair)
    assert run.step == STEPS
