"""SR-STE, MdGf, SdGf, BDWP, AST, SLoRB and CAST against their equations, written out in fp64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError, PatternError
from sparseworks.core.patterns import NM
from sparseworks.models.views import find_prunable
from sparseworks.weights.semistructured.bidirectional import (
    both_ways_conv,
    both_ways_linear,
    mac_share,
)
from sparseworks.weights.semistructured.cast import BlockScale
from sparseworks.weights.semistructured.gradient_flow import frames_of

STEPS = 16


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 4, 8), nn.Tanh(),
        nn.Linear(8, 4),
    ).double()  # fmt: skip


def batch(step):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(6, 8, 4, 4, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 4, (6,), generator=g)


def loop_mask(weight, n, m):
    """One group after the other; groups of a convolution are channels at one tap."""
    weight = weight.detach()
    mask = torch.zeros_like(weight)
    columns = weight.shape[1]
    taps = weight[0, 0].numel() if weight.ndim > 2 else 1
    flat, out = weight.reshape(len(weight), columns, taps), mask.view(len(weight), columns, taps)
    for row in range(len(weight)):
        for tap in range(taps):
            for first in range(0, columns, m):
                group = [abs(float(flat[row, first + i, tap])) for i in range(m)]
                for i in sorted(range(m), key=lambda i: (-group[i], i))[:n]:
                    out[row, first + i, tap] = 1.0
    return mask


def plain_gradients(model, used, step):
    """dL/dW of the loss at these weights, by autograd on an ordinary model."""
    given = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    given |= {n: w.detach().clone().requires_grad_() for n, w in used.items()}
    x, y = batch(step)
    loss = nn.functional.cross_entropy(functional_call(model, given, (x,)), y)
    names = list(given)
    return dict(zip(names, torch.autograd.grad(loss, [given[n] for n in names])))


def step_model(model, optimizer, step):
    optimizer.zero_grad()
    x, y = batch(step)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
@pytest.mark.parametrize("decay", [0.0, 0.3, -0.1])
def test_sr_ste_is_the_hand_formula(decay, pattern):
    """v <- mu v + g + lambda (1 - E) W + wd W;  W <- W - lr v;  g at E W."""
    n, m = map(int, pattern.split(":"))
    model, twin = net(), net()
    lr, momentum, wd = 0.1, 0.9, 0.02
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=wd)
    run = sw.sparsify(model, optimizer, "sr-ste", pattern=pattern, decay=decay)
    names = ["0.weight", "3.weight"]
    weights = {k: p.detach().clone() for k, p in twin.named_parameters()}
    speed = {k: torch.zeros_like(p) for k, p in weights.items()}
    for step in range(STEPS):
        masks = {k: loop_mask(weights[k], n, m) for k in names}
        for k in names:
            assert torch.equal(run.masks[k], masks[k].bool())
            torch.testing.assert_close(model.get_parameter(k), weights[k] * masks[k])
        used = {k: w * masks.get(k, 1.0) for k, w in weights.items()}
        gradient = plain_gradients(twin, used, step)
        for k, w in weights.items():
            pull = decay * (1 - masks[k]) * w if k in masks else 0.0
            speed[k] = momentum * speed[k] + gradient[k] + pull + wd * w
            weights[k] = w - lr * speed[k]
        step_model(model, optimizer, step)
    for k in names:
        torch.testing.assert_close(run.weight(k), weights[k])


def test_sr_ste_flips_fewer_masks_and_a_negative_term_more():
    flips = {}
    for decay in (-0.1, 0.0, 0.3):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        run = sw.sparsify(model, optimizer, "sr-ste", pattern="1:4", decay=decay)
        changed = 0
        for step in range(60):
            before = {k: v.clone() for k, v in run.masks.items()}
            step_model(model, optimizer, step % 8)
            changed += sum(int((v ^ before[k]).sum()) for k, v in run.masks.items())
        flips[decay] = changed
    assert flips[-0.1] > flips[0.0] > flips[0.3]


@pytest.mark.parametrize("decay,rate", [("exponential", 0.3), ("linear", 0.2)])
@pytest.mark.parametrize("backward", ["ste", "chain"])
def test_mdgf_is_its_equation(decay, rate, backward):
    model, twin = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = sw.sparsify(
        model, optimizer, "mdgf", steps=STEPS, dense=0.25, final=0.25, decay=decay, rate=rate,
        backward=backward,
    )  # fmt: skip
    names = ["0.weight", "3.weight"]
    weights = {k: p.detach().clone() for k, p in twin.named_parameters()}
    seen = []
    for step in range(STEPS):
        t = step - 4
        share = math.exp(-rate * t) if decay == "exponential" else max(0.0, 1 - rate * t)
        share = 1.0 if t <= 0 else 0.0 if step >= 12 else share
        seen.append(share)
        factor = {k: (f := loop_mask(weights[k], 2, 4)) + (1 - f) * share for k in names}
        for k in names:
            torch.testing.assert_close(model.get_parameter(k), weights[k] * factor[k])
        used = {k: w * factor.get(k, 1.0) for k, w in weights.items()}
        gradient = plain_gradients(twin, used, step)
        for k, w in weights.items():
            passed = factor[k] if k in factor and backward == "chain" else 1.0
            weights[k] = w - 0.1 * gradient[k] * passed
        step_model(model, optimizer, step)
    assert seen[0] == 1 and seen[-1] == 0 and 0 < seen[6] < 1
    for k in names:
        torch.testing.assert_close(run.weight(k), weights[k])
    run.finish()
    assert all(torch.equal(model.get_parameter(k).detach() != 0, run.masks[k]) for k in names)


def test_the_frames_of_sdgf_are_those_of_the_paper():
    def table(frames, n, m):
        return [str(p) for p in frames_of(frames, NM(n, m))]

    assert table("stepwise", 1, 16) == ["15:16", "8:16", "4:16", "2:16", "1:16"]
    assert table("stepwise", 1, 8) == ["7:8", "4:8", "2:8", "1:8"]
    assert table("stepwise", 2, 16) == ["15:16", "8:16", "4:16", "2:16"]
    assert table("stepwise", 2, 4) == ["3:4", "2:4"]
    assert table("geometric", 1, 4) == ["8:32", "4:16", "2:8", "1:4"]
    assert table("densify", 1, 4) == ["1:32", "1:16", "1:8", "1:4"]
    assert table("8:16,1:16", 1, 16) == ["8:16", "1:16"]


def test_sdgf_goes_through_its_frames():
    model = nn.Linear(32, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = sw.sparsify(
        model, optimizer, "sdgf", pattern="1:8", steps=20, dense=0.2, final=0.2, include="*"
    )
    kept = []
    for _ in range(20):
        kept.append(int(run.masks["weight"].view(-1, 8).sum(1).unique()))
        optimizer.zero_grad()
        model(torch.randn(3, 32, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert kept == [8] * 4 + [7] * 3 + [4] * 3 + [2] * 3 + [1] * 7
    with pytest.raises(ModelError, match="multiple of 64"):
        sw.sparsify(model, optimizer, "sdgf", pattern="1:8", steps=20, frames="densify",
                    include="*")  # fmt: skip


def test_the_products_of_bdwp_are_three_matrix_products():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 3, 16, generator=g).double(), torch.randn(8, 16, generator=g).double()
    forward = loop_mask(w, 2, 8)
    back = loop_mask(w.t(), 2, 8).t()
    assert not torch.equal(forward, back)
    x.requires_grad_()
    used, other = (w * forward).requires_grad_(), w * back
    bias = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    y = both_ways_linear(x, used, other, bias)
    torch.testing.assert_close(y, x @ (w * forward).t())
    dy = torch.randn(y.shape, generator=g).double()
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ (w * back))
    torch.testing.assert_close(used.grad, torch.einsum("abo,abi->oi", dy, x))
    torch.testing.assert_close(bias.grad, dy.sum((0, 1)))


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_convolution_of_bdwp_is_its_linear_form(mode, groups):
    """By autograd on the plain convolution: dx at the other weights, dw at its own."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups, padding_mode=mode).double()
    other = torch.randn_like(layer.weight)
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64, requires_grad=True)
    y = both_ways_conv(layer, x, layer.weight, other)
    dy = torch.randn_like(y)
    y.backward(dy)
    plain = copy.deepcopy(layer)
    plain.zero_grad()
    z = x.detach().clone().requires_grad_()
    expected = plain(z)
    torch.testing.assert_close(y, expected)
    expected.backward(dy)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    plain.weight.data.copy_(other)
    z = x.detach().clone().requires_grad_()
    plain(z).backward(dy)
    torch.testing.assert_close(x.grad, z.grad)


@pytest.mark.parametrize("backward", ["magnitude", "nested", "random"])
def test_every_column_of_bdwp_keeps_n_of_m_outputs(backward):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = sw.sparsify(model, optimizer, "bdwp", pattern="2:4", backward=backward)
    assert mac_share(run) == pytest.approx((2 * 0.5 + 1) / 3)
    backs = []
    for step in range(4):
        for name in ("0.weight", "3.weight"):
            layer = model.get_submodule(name[0])
            mask = run.method.backward_mask(run, name, run.weight(name), run.masks[name])
            assert torch.equal(layer.backward_weight, run.weight(name) * mask)
            columns = mask.reshape(len(mask), -1).t().reshape(-1, 4)
            assert bool((columns.sum(1) == 2).all())
            if backward == "magnitude":
                expected = loop_mask(run.weight(name).transpose(0, 1), 2, 4).transpose(0, 1)
                assert torch.equal(mask, expected.bool())
        backs.append(mask)
        step_model(model, optimizer, step)
    assert not torch.equal(backs[-1], run.masks["3.weight"])
    assert "backward_weight" not in "".join(model.state_dict())
    run.finish()
    assert [type(m) for m in model] == [type(m) for m in net()]
    assert not hasattr(model[0], "backward_weight")


def test_bdwp_computes_in_the_dtype_of_autocast():
    model = net().float()
    run = sw.sparsify(model, torch.optim.SGD(model.parameters(), 0.1), "bdwp", pattern="2:4")
    with torch.autocast("cpu", torch.bfloat16):
        y = model(batch(0)[0].float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32
    run.remove()


def scalar_adam(weight, gradients, mask_at, moved, lr, betas, eps):
    """One weight after the other, in Python floats: m, u = moved(...), v of u^2."""
    w = list(weight)
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, g in enumerate(gradients):
        mask = mask_at(t, w)
        for i in range(len(w)):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g[i]
            u = moved(t, m[i], w[i], mask[i])
            v[i] = betas[1] * v[i] + (1 - betas[1]) * u * u
            a, b = 1 - betas[0] ** (t + 1), 1 - betas[1] ** (t + 1)
            w[i] -= lr * (u / a) / (math.sqrt(v[i] / b) + eps)
    return w


def moving_masks(every, n, m):
    held = []

    def mask_at(t, w):
        if t % every == 0:
            held[:] = loop_mask(torch.tensor([w]), n, m)[0].tolist()
        return held

    return mask_at


def linear_run(begin, steps, seed=0):
    """A linear layer under given gradients: the loss is sum(g W)."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(1, 8, generator=g).double() * 0.1)
    first = model[0].weight.detach()[0].tolist()
    gradients = torch.randn(steps, 8, generator=g).double()
    optimizer, raw, finish = begin(model)
    for row in gradients:
        optimizer.zero_grad()
        (model(row[None]) if raw else (model[0].weight * row)).sum().backward()
        optimizer.step()
    return first, gradients.tolist(), finish()


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_ast_is_the_scalar_loop(decay):
    steps, ramp = 50, 20

    def begin(model):
        optimizer = torch.optim.AdamW(model.parameters(), 0.02, (0.9, 0.95), 1e-8, 0.0)
        run = sw.sparsify(
            model, optimizer, "ast", steps=steps, ramp=ramp / steps, decay=decay, every=5,
            include="*",
        )  # fmt: skip
        return optimizer, False, lambda: run.weight("0.weight")[0]

    first, gradients, found = linear_run(begin, steps)

    def moved(t, e, w, kept):
        return e + decay * min(1.0, t / ramp) * (1 - kept) * w

    expected = scalar_adam(first, gradients, moving_masks(5, 2, 4), moved, 0.02, (0.9, 0.95), 1e-8)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    plain = torch.tensor(first, dtype=torch.float64).requires_grad_()
    adam = torch.optim.Adam([plain], 0.02, (0.9, 0.95))
    for row in gradients:
        plain.grad = torch.tensor(row, dtype=torch.float64)
        adam.step()
    assert float((plain.detach() - found).abs().max()) > 0.01  # v of u^2, not of g^2


def test_the_other_term_of_ast_is_sr_ste_with_a_ramp():
    models = []
    for method, options in (
        ("ast", {"term": "gradient", "ramp": 0.0, "every": 1, "decay": 0.1, "steps": STEPS}),
        ("sr-ste", {"decay": 0.1}),
    ):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sw.sparsify(model, optimizer, method, **options)
        for step in range(STEPS):
            step_model(model, optimizer, step)
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_adams_of_cast_is_the_scalar_loop(decay):
    steps = 50

    def begin(model):
        job = sw.transform(model, "cast", steps=steps, decay=decay, every=5, blocks=0, include="*")
        optimizer = torch.optim.AdamW(job.parameter_groups(), 0.02, (0.9, 0.95), 1e-8, 0.0)
        job.attach(optimizer)
        return optimizer, False, lambda: model[0].weight.detach()[0].clone()

    first, gradients, found = linear_run(begin, steps)

    def moved(t, mu, w, kept):
        if kept:
            return mu
        a = t / steps
        return (1 - a) * mu + a * decay * math.copysign(1.0, w) * (w != 0)

    expected = scalar_adam(first, gradients, moving_masks(5, 2, 4), moved, 0.02, (0.9, 0.95), 1e-8)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_without_a_loss_cast_moves_losers_alone_and_they_reach_the_last_rate():
    model = nn.Sequential(nn.Linear(16, 8)).double()
    job = sw.transform(model, "cast", steps=400, blocks=0, include="*")
    optimizer = torch.optim.AdamW(job.parameter_groups(), 1e-2, (0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 400)
    job.attach(optimizer)
    before = model[0].weight.detach().clone()
    kept = job.masks["0.weight"].clone()
    for _ in range(400):
        optimizer.zero_grad()
        (model[0].weight * 0).sum().backward()
        optimizer.step()
        schedule.step()
    after = model[0].weight.detach()
    assert torch.equal(after[kept], before[kept])
    assert float(after[~kept].abs().max()) < 2e-3 < float(before[~kept].abs().mean())


def test_cast_folds_its_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 6)).double()
    job = sw.transform(model, "cast", steps=8, include="*")
    optimizer = torch.optim.AdamW(job.parameter_groups(lr=0.05), 1e-2)
    job.attach(optimizer)
    for step in range(8):
        optimizer.zero_grad()
        model(batch(step)[0]).square().mean().backward()
        optimizer.step()
    factors = {n: job.part(n, BlockScale).factor.detach().clone() for n in job.views}
    parts = {n: (factors[n], p.detach().clone()) for n, p in job.parameters.items()}
    assert all(bool((a != 1).any()) for a, _ in parts.values())
    record = job.finish()
    for name, (factor, theta) in parts.items():
        expected = theta * record[name]
        halves = expected.chunk(2, 1)
        scaled = [
            h * factor[:, j].view(-1, *(1 for _ in h.shape[1:])) for j, h in enumerate(halves)
        ]
        torch.testing.assert_close(model.get_parameter(name).detach(), torch.cat(scaled, 1))
    assert sw.masks(model).violations(model) == {} and record.sparsity() == 0.5
    assert [n for n, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("method", ["cast", "slorb"])
def test_transforms_resume_exactly(method):
    def begin():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
        job = sw.transform(model, method, steps=STEPS)
        optimizer = torch.optim.AdamW(job.parameter_groups(), 1e-2)
        return model, optimizer, job.attach(optimizer)

    def train(model, optimizer, first, last):
        for step in range(first, last):
            g = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 32, generator=g)).square().sum().backward()
            optimizer.step()

    model, optimizer, job = begin()
    train(model, optimizer, 0, 7)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), job.state_dict()))
    train(model, optimizer, 7, STEPS)
    job.finish()
    again, other, resumed = begin()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(again, other, 7, STEPS)
    resumed.finish()
    for a, b in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)


def test_the_branch_of_slorb_starts_with_what_pruning_took_from_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 6)).double()
    dense = copy.deepcopy(model)
    job = sw.transform(model, "slorb", block=8, steps=4, include="*")
    optimizer = torch.optim.AdamW(job.parameter_groups(), 1e-3)
    job.attach(optimizer)
    blocky = torch.randn(5, 4, dtype=torch.float64).repeat_interleave(8, 1)
    torch.testing.assert_close(model(blocky), dense(blocky))
    plain = torch.randn(5, 32, dtype=torch.float64)
    assert not torch.allclose(model(plain), dense(plain))
    lost = dense[0].weight * (1 - loop_mask(dense[0].weight, 2, 4))
    torch.testing.assert_close(model[0].branch, lost.view(6, 4, 8).sum(2) / 8)
    branch = model[0].branch.detach().clone()
    model(plain).square().sum().backward()
    optimizer.step()
    job.finish()
    assert not torch.equal(model[0].branch, branch) and model[0].pooling.grad is None
    assert sw.masks(model).violations(model) == {}
    assert {v.name for v in find_prunable(model, "*")} >= {"0.weight"}


@pytest.mark.parametrize(
    "method,options,error,message",
    [
        ("cast", {"steps": None}, InvalidArgument, "give `steps`"),
        ("cast", {"blocks": 3}, PatternError, "3 blocks divide"),
        ("slorb", {"block": 5}, ModelError, "5 divides"),
        ("slorb", {"every": 0}, InvalidArgument, "every=0"),
    ],
)
def test_misuse_of_the_transforms_changes_nothing(method, options, error, message):
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4))
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        sw.transform(model, method, **{"steps": 4, **options})
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    job = sw.transform(model, method, steps=4)
    with pytest.raises(InvalidArgument, match="SGD is none"):
        job.attach(torch.optim.SGD(model.parameters(), 0.1))
