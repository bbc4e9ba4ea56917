"""The hooks in the loops people write: accumulation, clipping, autocast, scalers, torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw

STEPS = 12
METHODS = ["gradual", "rigl", "granet", "set"]


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4)
    ).to(dtype)


def batches(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(8, 10, generator=g, dtype=dtype), torch.randint(0, 4, (8,), generator=g)


def start(model, method="rigl", lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    every = {} if method == "static" else {"every": 2}
    return optimizer, sw.sparsify(model, optimizer, method, sparsity=0.7, steps=STEPS, **every)


def step(model, optimizer, x, y, parts=1, clip=None):
    optimizer.zero_grad()
    for a, b in zip(x.chunk(parts), y.chunk(parts)):
        (nn.functional.cross_entropy(model(a), b) / parts).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_batches_choose_the_masks_of_one_large_batch(method):
    whole, split = net(), net()
    a, b = start(whole, method), start(split, method)
    for x, y in batches():
        step(whole, a[0], x, y)
        step(split, b[0], x, y, parts=4)
        assert all(torch.equal(a[1].masks[n], b[1].masks[n]) for n in a[1].masks)
    for p, q in zip(whole.parameters(), split.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_clipping_sees_the_kept_gradients_only():
    model = net()
    optimizer, run = start(model)
    x, y = next(batches())
    plain = copy.deepcopy(model)
    nn.functional.cross_entropy(plain(x), y).backward()
    square = 0.0
    for name, p in plain.named_parameters():
        kept = p.grad[run.masks[name]] if name in run.masks else p.grad
        square += float(kept.square().sum())
    nn.functional.cross_entropy(model(x), y).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert float(norm) == pytest.approx(square**0.5, rel=1e-12)
    optimizer.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_and_scaler_keep_the_zero_law(method, half):
    model = net(torch.float32)
    optimizer, run = start(model, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches(torch.float32):
        optimizer.zero_grad()
        with torch.autocast("cpu", half):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        for name, parameter in run.parameters.items():
            assert bool((parameter.detach()[~run.masks[name]] == 0).all())
    assert run.step == STEPS
    assert run.finish().sparsity() == pytest.approx(0.7, abs=5e-3)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("method", ["rigl", "granet"])
def test_a_step_that_the_scaler_skips_leaves_no_trace(method, set_to_none):
    """An overflow: gradients are thrown away, the optimizer does not step, the run does not."""
    plain, skipping = net(torch.float32), net(torch.float32)
    a, b = start(plain, method), start(skipping, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
    for i, (x, y) in enumerate(batches(torch.float32)):
        step(plain, a[0], x, y)
        for overflow in (True, False) if i % 2 else (False,):
            b[0].zero_grad(set_to_none=set_to_none)
            loss = nn.functional.cross_entropy(skipping(x * (2 if overflow else 1)), y)
            scaler.scale(loss * (float("inf") if overflow else 1)).backward()
            scaler.step(b[0])
            scaler.update(1.0)
        assert a[1].step == b[1].step
        assert all(torch.equal(a[1].masks[n], b[1].masks[n]) for n in a[1].masks)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), skipping.parameters()))


@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_models_train_the_same(method, wrapped_first):
    plain, inner = net(), net()
    compiled = torch.compile(inner, backend="aot_eager")
    a, b = start(plain, method), start(compiled if wrapped_first else inner, method)
    for x, y in batches():
        step(plain, a[0], x, y)
        step(compiled, b[0], x, y)
        assert all(torch.equal(a[1].masks[n], b[1].masks[n]) for n in a[1].masks)
    b[1].finish()
    assert sw.masks(inner).violations(inner) == {}
    for p, q in zip(plain.parameters(), inner.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", ["load, start", "start, load"])
@pytest.mark.parametrize("method", [*METHODS, "static"])
def test_weights_may_be_loaded_before_or_after_the_run_starts(method, order):
    model = net()
    optimizer, run = start(model, method)
    data = list(batches())
    for x, y in data[:6]:
        step(model, optimizer, x, y)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), run.state_dict()))
    for x, y in data[6:]:
        step(model, optimizer, x, y)
    torch.manual_seed(5)
    again = net()
    for p in again.parameters():
        nn.init.normal_(p)
    if order == "start, load":
        other, resumed = start(again, method)
        again.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
    else:
        again.load_state_dict(saved[0])
        other = torch.optim.SGD(again.parameters(), 0.1, momentum=0.9)
        other.load_state_dict(saved[1])
        every = {} if method == "static" else {"every": 2}
        resumed = sw.sparsify(again, other, method, sparsity=0.7, steps=STEPS, **every)
    resumed.load_state_dict(saved[2])
    for x, y in data[6:]:
        step(again, other, x, y)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    assert all(torch.equal(run.masks[n], resumed.masks[n]) for n in run.masks)


def test_a_closure_optimizer_works():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    run = sw.sparsify(model, optimizer, "static", sparsity=0.5)
    for x, y in batches():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        for name, parameter in run.parameters.items():
            assert bool((parameter.detach()[~run.masks[name]] == 0).all())
