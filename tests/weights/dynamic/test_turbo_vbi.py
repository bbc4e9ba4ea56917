"""Message passing against enumeration, closed forms against integrals, and the laws of training."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.dynamic.turbo_vbi import (
    Hyper,
    TurboVBI,
    chain_messages,
    precision_and_evidence,
)

STEPS = 20
X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, :2].sum(1) > 0).long()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def start(**options):
    model = net()
    options = {"samples": 30, "include": "*", "seed": 5, **options}
    job = sw.transform(model, "turbo-vbi", steps=STEPS, **options)
    optimizer = torch.optim.Adam(job.parameter_groups(lr=0.05), 0.01)
    return model, optimizer, job.attach(optimizer)


def train(model, optimizer, job, steps):
    model.train()
    for step in steps:
        x, y = X.roll(step, 0)[:10], Y.roll(step, 0)[:10]
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + job.penalty()).backward()
        optimizer.step()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 7), st.floats(0.02, 0.95), st.floats(0.02, 0.95)
)  # fmt: skip
def test_messages_are_exact_extrinsic_odds(seed, length, p01, p10):
    g = torch.Generator().manual_seed(seed)
    nu = 4 * torch.randn(2, length, generator=g, dtype=torch.float64)
    found = chain_messages(nu, p01, p10)
    for row in range(2):
        total = torch.zeros(length, 2, dtype=torch.float64)
        for states in itertools.product((0, 1), repeat=length):
            chance = p01 / (p01 + p10) if states[0] else p10 / (p01 + p10)
            for a, b in itertools.pairwise(states):
                move = p01 if a == 0 else p10
                chance *= move if a != b else 1 - move
            for n in range(length):  # the evidence of all but n
                others = sum(float(nu[row, m]) for m in range(length) if states[m] and m != n)
                total[n, states[n]] += chance * math.exp(others)
        torch.testing.assert_close(found[row], (total[:, 1] / total[:, 0]).log())


def test_messages_of_certain_evidence_stay_finite():
    nu = torch.tensor([[1e4, -1e4, 1e4, 1e4, -1e4]])
    found = chain_messages(nu, 0.05, 0.2)
    assert bool(torch.isfinite(found).all())
    # between certain neighbours 1 and 1: (0.8 * 0.8) / (0.2 * 0.05)
    assert float(found[0, 1]) == pytest.approx(math.log(0.64 / 0.01), rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-6, 10.0), st.floats(-4, 4), st.floats(0.6, 3.0))
def test_the_joint_posterior_of_precision_and_support_is_its_integral(square, prior, shape):
    hyper = Hyper(shape, shape, shape, 1e-2 * shape)
    found, evidence = precision_and_evidence(
        torch.tensor([square], dtype=torch.float64), torch.tensor([prior], dtype=torch.float64),
        hyper,
    )  # fmt: skip
    log_rho = torch.linspace(-20, 20, 40001, dtype=torch.float64)
    rho = log_rho.exp()
    weights = []
    for a, b in ((hyper.a0, hyper.b0), (hyper.a, hyper.b)):
        log_gamma = a * math.log(b) - math.lgamma(a) + (a - 1) * log_rho - b * rho
        # N(w; 0, 1/rho) with <w^2>, and d rho = rho d ln rho; the constant cancels
        weights.append((log_gamma + 0.5 * log_rho - 0.5 * rho * square + log_rho).exp())
    off, on = (float(torch.trapezoid(w, log_rho)) for w in weights)
    assert float(evidence) == pytest.approx(math.log(on / off), abs=1e-4)
    share = math.exp(prior) / (1 + math.exp(prior))
    mixed = (1 - share) * weights[0] + share * weights[1]
    mean = float(torch.trapezoid(rho * mixed, log_rho) / torch.trapezoid(mixed, log_rho))
    assert float(found) == pytest.approx(mean, rel=1e-4)


def test_mean_field_does_not_start_in_the_trap():
    """From <s> = 1 even a zero weight is used for ever: b rho is then at most a + 1/2."""
    hyper = Hyper(1.0, 1.0, 1.0, 1e-3)
    square, prior = torch.tensor([0.0, 2.0]).double(), torch.full((2,), 3.0).double()
    _, evidence = precision_and_evidence(square, prior, hyper, "mean-field", sweeps=50)
    assert evidence[0] + prior[0] < 0 < evidence[1] + prior[1]
    assert hyper.b * (hyper.a + 0.5) / hyper.b <= 1.5  # rho of used weights, w = 0
    trapped = math.log(hyper.b / hyper.b0) - (hyper.b - hyper.b0) * 1.5
    assert trapped > 0  # the evidence there: used


def test_mean_field_is_a_fixed_point_of_both_updates():
    square = torch.tensor([1e-4, 0.1, 2.0], dtype=torch.float64)
    prior = torch.full((3,), -1.0, dtype=torch.float64)
    hyper = Hyper(1.0, 0.5, 2.0, 1e-2)
    rho, nu = precision_and_evidence(square, prior, hyper, "mean-field", sweeps=500)
    for k in range(3):
        on = 1 / (1 + math.exp(-(-1.0 + float(nu[k]))))
        shape = on * 1.0 + (1 - on) * 2.0 + 0.5
        rate = on * 0.5 + (1 - on) * 1e-2 + float(square[k]) / 2
        assert float(rho[k]) == pytest.approx(shape / rate, rel=1e-6)
        log_rho = float(torch.digamma(torch.tensor(shape, dtype=torch.float64))) - math.log(rate)
        one = math.log(0.5) + 0.0 * log_rho - 0.5 * shape / rate
        two = 2 * math.log(1e-2) - math.lgamma(2.0) + 1.0 * log_rho - 1e-2 * shape / rate
        assert float(nu[k]) == pytest.approx(one - two, rel=1e-5)


def test_penalty_is_the_gaussian_divergence_and_its_share_rises():
    _, _, job = start(start=0.0, end=1.0)
    total = 0.0
    for name, weight in job.parameters.items():
        part = job.part(name)
        var = (2 * part.log_sigma.detach()).exp()
        prior = torch.distributions.Normal(0.0, part.precision.rsqrt())
        q = torch.distributions.Normal(weight.detach(), var.sqrt())
        kl = torch.distributions.kl_divergence(q, prior).sum()
        # without the parts that neither mu nor sigma moves: 1/2 ln(1/rho) - 1/2
        total += float(kl) + float((0.5 * part.precision.log() + 0.5).sum())
    for step in (0, 9):
        job.step = step
        share = (step + 1) / STEPS
        assert float(job.penalty().detach()) == pytest.approx(share * total / 30, rel=1e-4)


def test_weights_are_noisy_in_training_alone_and_the_same_in_every_pass_of_a_step():
    model, optimizer, job = start()
    layer = model[0]
    mean = job.parameters["0.weight"]
    model.train()
    first, second = layer.weight.detach(), layer.weight.detach()
    assert torch.equal(first, second) and not torch.equal(first, mean.detach())
    sigma = job.part("0.weight").log_sigma.exp().detach()
    assert float(((first - mean.detach()) / sigma).abs().mean()) == pytest.approx(0.8, abs=0.35)
    train(model, optimizer, job, [0])
    noise = (layer.weight - mean).detach() / job.part("0.weight").log_sigma.exp().detach()
    assert not torch.allclose(noise, (first - mean.detach()) / sigma, atol=1e-2)
    model.eval()
    assert torch.equal(layer.weight.detach(), mean.detach())


@pytest.mark.parametrize("coupling", ["row", "grid", "none"])
@pytest.mark.parametrize("sparsity", [None, 0.75])
def test_finish_keeps_the_means_of_the_support_and_exact_zeros(coupling, sparsity):
    model, optimizer, job = start(coupling=coupling, sparsity=sparsity, rounds=3)
    train(model, optimizer, job, range(STEPS))
    means = {n: p.detach().clone() for n, p in job.parameters.items()}
    parts = {n: job.part(n) for n in job.views}
    record = job.finish()
    for name, mean in means.items():
        mask = record[name]
        assert torch.equal(model.get_parameter(name).detach(), mean * mask)
        support = parts[name].support
        if sparsity is None:
            assert torch.equal(mask, support >= 0)
        else:
            assert int(mask.sum()) == mean.numel() - round(0.75 * mean.numel())
            assert float(support[mask].min()) >= float(support[~mask].max())
    assert sw.masks(model).violations(model) == {}
    assert set(dict(model.named_parameters())) == set(dict(net().named_parameters()))


def test_the_chain_fills_a_gap_and_drops_what_stands_alone():
    """Equal evidence, other neighbours: the coupling decides."""
    square = torch.full((1, 12), 1e-8)
    square[0, 1:6] = 4.0
    square[0, 3] = square[0, 9] = 0.08  # one within a run, one alone
    hyper = Hyper(1.0, 1.0, 1.0, 1e-2)
    prior = torch.full_like(square, math.log(0.1 / 0.3))
    _, nu = precision_and_evidence(square, prior, hyper)
    assert float(nu[0, 3]) == float(nu[0, 9])
    support = chain_messages(nu, 0.1, 0.3) + nu
    assert float(support[0, 3]) > 0 > float(support[0, 9])


@pytest.mark.parametrize("stop", [4, 9, 15])
def test_resuming_is_exact_and_seeds_decide_the_noise(stop):
    whole = start(rounds=4)
    train(*whole, range(stop))
    saved = copy.deepcopy([part.state_dict() for part in whole])
    train(*whole, range(stop, STEPS))
    again = start(rounds=4)
    for part, state in zip(again, saved):
        part.load_state_dict(state)
    train(*again, range(stop, STEPS))
    other = start(rounds=4, seed=6)
    train(*other, range(STEPS))
    for job in (whole, again, other):
        job[2].finish()
    pairs = list(zip(*(w[0].parameters() for w in (whole, again, other))))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_the_posterior_of_half_precision_weights_is_in_single_precision():
    model = net().bfloat16()
    options = {"samples": 30, "include": "*", "steps": 4, "start": 0.0, "rounds": 2}
    job = sw.transform(model, "turbo-vbi", sparsity=0.5, **options)
    optimizer = torch.optim.SGD(job.parameter_groups(lr=0.05), 0.01)
    job.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.train()(X[:10].bfloat16()).float().square().mean() + job.penalty()
        loss.backward()
        optimizer.step()
    mean = job.parameters["0.weight"].detach()
    support = job.part("0.weight").support
    assert mean.dtype == torch.bfloat16 and support.dtype == torch.float32
    assert len(support.unique()) > len(mean.abs().unique())  # as bfloat16 many odds would be equal
    assert job.finish().sparsity() == pytest.approx(0.5, abs=0.02)


def test_the_first_round_sets_the_scale_and_no_other_does():
    setup = start(start=0.25, end=0.75, rounds=3)
    job = setup[2]
    train(*setup, range(4))
    part = job.part("0.weight")
    assert float(part.scale) == 0
    train(*setup, range(4, 5))
    mean_square = float(job.parameters["0.weight"].detach().square().mean())
    share = job.method.p01 / (job.method.p01 + job.method.p10)
    assert float(part.scale) == pytest.approx(mean_square / share, rel=1e-5)
    scale = float(part.scale)
    train(*setup, range(5, STEPS))
    job.finish()
    assert float(part.scale) == scale


def test_misuse_is_refused_before_anything_changes():
    model = net()
    before = copy.deepcopy(model.state_dict())
    for options, message in (
        ({"samples": 0}, "samples"),
        ({"p01": 0.0}, "p01"),
        ({"coupling": "ring"}, "coupling"),
        ({"start": 0.9, "end": 0.5}, "end"),
        ({"pattern": "rows"}, "unstructured"),
        ({"steps": None}, "give `steps`"),
    ):
        options = {"samples": 30, "steps": 9, "include": "*", **options}
        with pytest.raises(InvalidArgument, match=message):
            sw.transform(model, "turbo-vbi", **options)
    assert list(model.state_dict()) == list(before)
    with pytest.raises(InvalidArgument, match="damping"):
        TurboVBI(samples=3, damping=1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
