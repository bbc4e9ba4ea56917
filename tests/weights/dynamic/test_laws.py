"""Laws of the methods that train with masks: exact sparsity at every step, fresh regrowth,
determinism, exact resumption, and that sparsity 0 is plain training."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.budgets import erk
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.schedules import cosine, cubic, interval
from sparseworks.models.views import find_prunable

STEPS = 24
OPTIONS = {
    "static": {},
    "set": {"every": 3},
    "rigl": {"every": 3},
    "granet": {"every": 3},
    "gradual": {"every": 3},
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, 32), nn.ReLU(), nn.Linear(32, 5),
    )  # fmt: skip


def batches(first, last):
    for i in range(first, last):
        g = torch.Generator().manual_seed(i)
        yield torch.randn(8, 3, 8, 8, generator=g), torch.randint(0, 5, (8,), generator=g)


def train(model, optimizer, first=0, last=STEPS, after=lambda: None, parts=1):
    for x, y in batches(first, last):
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts)):
            (nn.functional.cross_entropy(model(a), b) / parts).backward()
        optimizer.step()
        after()


def expected_sparsity(method, step, target):
    if method == "gradual":
        end = round(0.75 * STEPS)
        return 0.0 if step < 3 else cubic(
            end if step >= end else step // 3 * 3, begin=0, end=end, final=target
        )  # fmt: skip
    if method == "granet":
        end = round(0.7 * STEPS)
        moved = end if step >= end else step // 3 * 3
        return cubic(moved, begin=0, end=end, initial=0.5, final=target)
    return target


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_zero_law_at_every_step(method, optimizer_name):
    model = net()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    run = sw.sparsify(model, optimizer, method, sparsity=0.8, steps=STEPS, **OPTIONS[method])
    total = sum(m.numel() for m in run.masks.values())

    def check():
        wanted = expected_sparsity(method, run.step, 0.8)
        masked = sum(int((~m).sum()) for m in run.masks.values())
        assert abs(masked - wanted * total) <= 1
        for name, parameter in run.parameters.items():
            dropped = ~run.masks[name]
            assert bool((parameter.detach()[dropped] == 0).all())
            for value in optimizer.state[parameter].values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    assert bool((value[dropped] == 0).all())

    train(model, optimizer, after=check)
    record = run.finish()
    assert record.sparsity() == pytest.approx(0.8, abs=1 / total)
    assert sw.masks(model).violations(model) == {}


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_rewiring_moves_the_number_the_schedule_says(method):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    run = sw.sparsify(model, optimizer, method, sparsity=0.7, steps=STEPS, **OPTIONS[method])
    specs = [v.spec(run.pattern) for v in find_prunable(model)]
    assert {n: int(m.sum()) for n, m in run.masks.items()} == erk(specs, 0.7)
    end = round(0.75 * STEPS)
    before = {n: m.clone() for n, m in run.masks.items()}
    weights = {}

    def check():
        for name, mask in run.masks.items():
            moved = int((mask & ~before[name]).sum())
            share = cosine(run.step, begin=0, end=end, initial=0.3)
            due = run.step % 3 == 0 and run.step <= end
            assert moved <= (int(share * int(mask.sum())) if due else 0)
            grown = mask & ~before[name]
            assert bool((run.parameters[name].detach()[grown] == 0).all())
            assert int(mask.sum()) == int(before[name].sum())
            before[name] = mask.clone()
            weights[name] = moved + weights.get(name, 0)

    train(model, optimizer, after=check)
    assert sum(weights.values()) > 0


def test_rigl_grows_where_the_dense_gradient_is_largest():
    model, twin = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = sw.sparsify(model, optimizer, "rigl", sparsity=0.9, steps=10, every=1, fraction=0.2)
    before = {n: m.clone() for n, m in run.masks.items()}
    twin.load_state_dict(model.state_dict())
    ((x, y),) = batches(0, 1)
    nn.functional.cross_entropy(twin(x), y).backward()
    gradients = {n: p.grad for n, p in twin.named_parameters()}
    train(model, optimizer, 0, 1)
    for name, mask in run.masks.items():
        grown, waiting = mask & ~before[name], ~mask & ~before[name]
        if bool(grown.any()) and bool(waiting.any()):
            lowest = gradients[name].abs()[grown].min()
            assert lowest >= gradients[name].abs()[waiting].max()


def test_dense_gradients_survive_accumulation():
    found = []
    for parts in (1, 4):
        model = net().eval()  # no batch statistics: the sum over parts is the whole
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        run = sw.sparsify(model, optimizer, "rigl", sparsity=0.9, steps=10, every=1)
        train(model, optimizer, 0, 1, parts=parts)
        found.append({n: m.clone() for n, m in run.masks.items()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("method", ["gradual", "rigl", "set", "static"])
def test_sparsity_zero_is_plain_training(method):
    plain, sparse = net(), net()
    first = OPTIMIZERS["adamw"](plain.parameters())
    second = OPTIMIZERS["adamw"](sparse.parameters())
    run = sw.sparsify(sparse, second, method, sparsity=0.0, steps=STEPS, **OPTIONS[method])
    train(plain, first)
    train(sparse, second)
    run.finish()
    for a, b in zip(plain.state_dict().values(), sparse.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_the_same_seed_gives_the_same_run_and_resuming_is_exact(method):
    def make(seed=3):
        model = net()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        run = sw.sparsify(
            model, optimizer, method, sparsity=0.8, steps=STEPS, seed=seed, **OPTIONS[method]
        )
        return model, optimizer, run

    whole, optimizer, run = make()
    train(whole, optimizer, 0, 13)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), run.state_dict()))
    train(whole, optimizer, 13, STEPS)
    again, optimizer, run = make()
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    train(again, optimizer, 13, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(),
                                                 again.state_dict().values()))  # fmt: skip
    if method != "gradual":
        assert any(not torch.equal(m, n) for m, n in zip(make(3)[2].masks.values(),
                                                         make(4)[2].masks.values()))  # fmt: skip


@pytest.mark.parametrize("second", [*sorted(OPTIONS), "fixed"])
@pytest.mark.parametrize("first", sorted(OPTIONS))
def test_a_second_run_after_the_first_is_finished_is_a_run_of_its_own(first, second):
    """On the same model and optimizer; nothing of the first goes on beside it."""
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    run = sw.sparsify(model, optimizer, first, sparsity=0.7, steps=STEPS, **OPTIONS[first])
    train(model, optimizer)
    kept = run.finish()
    twin = net()
    twin.load_state_dict(model.state_dict())
    sw.attach(twin, kept)
    alike = OPTIMIZERS["sgd"](twin.parameters())
    alike.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    runs = []
    for net_, optimizer_ in ((model, optimizer), (twin, alike)):
        given = {} if second == "fixed" else {"sparsity": 0.8, "steps": STEPS, **OPTIONS[second]}
        runs.append(sw.sparsify(net_, optimizer_, second, **given))
        train(net_, optimizer_)
    assert runs[0].step == STEPS and run.step == STEPS
    records = [r.finish() for r in runs]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))
    for record, net_ in zip(records, (model, twin)):
        assert record.sparsity() == pytest.approx(0.7 if second == "fixed" else 0.8, abs=1e-3)
        assert sw.masks(net_).violations(net_) == {}
    if second == "fixed":
        assert all(torch.equal(records[0][n], m) for n, m in kept.items())


def test_gradual_masks_never_grow():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    run = sw.sparsify(model, optimizer, "gradual", sparsity=0.9, steps=STEPS, every=2)
    before = {n: m.clone() for n, m in run.masks.items()}

    def check():
        assert all(not bool((m & ~before[n]).any()) for n, m in run.masks.items())
        before.update({n: m.clone() for n, m in run.masks.items()})

    train(model, optimizer, after=check)


def test_structured_patterns_train_too():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    run = sw.sparsify(
        model, optimizer, "gradual", sparsity=0.5, steps=STEPS, pattern="rows", budget="uniform"
    )
    train(model, optimizer)
    run.finish()
    for name, mask in run.masks.items():
        rows = mask.flatten(1)
        assert torch.equal(rows.any(1), rows.all(1)), name


@pytest.mark.parametrize(
    "options,message",
    [
        ({"sparsity": 0.5}, "give `steps`"),
        ({"steps": 10}, "needs `sparsity`"),
        ({"sparsity": 1.2, "steps": 10}, "not in"),
        ({"sparsity": 0.5, "steps": 10, "every": 0}, "every"),
        ({"sparsity": 0.5, "steps": 10, "end": 1.5}, "must be in"),
    ],
)
def test_misuse(options, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    for method in ("gradual", "rigl"):
        with pytest.raises(InvalidArgument, match=message):
            sw.sparsify(model, OPTIMIZERS["sgd"](model.parameters()), method, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", ["set", "rigl", "granet", "gradual", "dsl"])
@pytest.mark.parametrize("steps", [1, 7, 60, 500, 5000])
def test_the_default_interval_is_the_law_of_the_schedules(method, steps):
    def train_with(**given):
        model = net()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        run = sw.sparsify(model, optimizer, method, sparsity=0.8, steps=steps, **given)
        train(model, optimizer, last=min(steps, 12))
        return model, run

    model, run = train_with()
    twin, told = train_with(every=interval(steps))
    assert run.every == told.every == interval(steps)
    assert all(torch.equal(m, told.masks[n]) for n, m in run.masks.items())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))
    told.load_state_dict(run.state_dict())  # the same run, whoever chose the interval
    if steps <= 12:
        assert run.finish().sparsity() == pytest.approx(0.8, abs=2e-3)


def test_a_schedule_that_outlasts_the_training_is_named():
    for steps, warns in ((2 * STEPS, True), (STEPS, False)):
        model = net()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        run = sw.sparsify(model, optimizer, "gradual", sparsity=0.9, steps=steps, every=2)
        train(model, optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.finish()
        said = [str(w.message) for w in caught]
        assert any(f"stopped at step {STEPS} of {2 * STEPS}" in m for m in said) == warns, said


def test_resuming_with_another_method_is_refused():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    state = sw.sparsify(model, optimizer, "set", sparsity=0.5, steps=9).state_dict()
    fresh = net()
    run = sw.sparsify(fresh, OPTIMIZERS["sgd"](fresh.parameters()), "rigl", sparsity=0.5, steps=9)
    with pytest.raises(InvalidArgument, match="method 'set'"):
        run.load_state_dict(state)
