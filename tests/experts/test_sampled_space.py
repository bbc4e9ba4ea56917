"""Averaging as a matrix, merged experts as one MLP, stages by time, the filter by DFT matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.experts.sampled_space import MeanExperts, RandomSplit, average
from sparseworks.experts.spectral import SpectralFilter
from sparseworks.experts.time_stages import TimeStages
from sparseworks.models.zoo import ByteDecoder, FeedForward

D = torch.float64


@pytest.mark.parametrize("n", [2, 5, 16])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.3, 0.8])
def test_averaging_is_a_matrix(n, beta):
    g = torch.Generator().manual_seed(n)
    bank = torch.randn(n, 3, 4, generator=g, dtype=D)
    before = bank.clone()
    average(bank, beta)
    matrix = (1 - beta) * torch.eye(n, dtype=D)
    matrix += beta / (n - 1) * (torch.ones(n, n, dtype=D) - torch.eye(n, dtype=D))
    assert torch.allclose(bank, (matrix @ before.flatten(1)).view_as(bank), atol=1e-12)
    apart, was = (t - t.mean(0) for t in (bank, before))
    assert torch.allclose(apart, (1 - beta * n / (n - 1)) * was, atol=1e-12)
    average(bank, (n - 1) / n)
    assert torch.allclose(bank, before.mean(0).expand_as(bank), atol=1e-12)


def test_sixteen_experts_at_the_last_rate_come_nearer_by_a_third():
    bank = torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=D)
    before = (bank - bank.mean(0)).norm()
    average(bank, 0.3)
    assert float((bank - bank.mean(0)).norm() / before) == pytest.approx(0.68)


@pytest.mark.parametrize("length", [16, 18, 3])
def test_positions_are_split_evenly_and_alike_for_the_batch(length):
    router = RandomSplit(8, 4).train()
    seen = router(torch.randn(3, length, 4)).chosen
    assert torch.equal(seen[0], seen[1]) and bool((seen.sum(-1) == 1).all())
    counts = seen[0].sum(0)
    assert int(counts.max()) - int(counts.min()) <= 1
    assert bool(router.eval()(torch.randn(3, length, 4)).chosen[..., 0].all())
    assert not list(router.parameters())


def test_equal_experts_are_the_mlp_for_every_permutation():
    torch.manual_seed(0)
    model = ByteDecoder(16, 2, 2, mlp=lambda: FeedForward(16, 24))
    ids = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        before = model.eval()(ids)
        run = sw.upcycle(model, "ss-moe", experts=4)
        assert torch.allclose(model.eval()(ids), before, atol=1e-6)
        for _ in range(3):
            assert torch.allclose(model.train()(ids), before, atol=1e-6)
    assert not next(iter(run.layers.values())).gate.state_dict()


def test_the_optimizer_keeps_its_experts_and_the_end_is_their_mean():
    torch.manual_seed(0)
    model = ByteDecoder(16, 1, 2, mlp=lambda: FeedForward(16, 24))
    run = sw.upcycle(model, "ss-moe", experts=4, rate=0.3, ramp=4)
    [layer] = run.layers.values()
    held = {id(p) for p in layer.parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    run.attach(optimizer)
    ids = torch.randint(0, 256, (2, 12))
    for step in range(6):
        optimizer.zero_grad()
        model.train()(ids).square().mean().backward()
        optimizer.step()
        assert {id(p) for p in layer.parameters()} == held
        assert run._method.beta(run.step) == pytest.approx(0.3 * min(1, (step + 1) / 4))
    assert float(layer.experts.down_proj.std(0).max()) > 0
    x = torch.randn(7, 16)
    up, down, up_bias, down_bias = (p.mean(0) for p in layer.experts.weights)
    wanted = torch.nn.functional.gelu(x @ up.T + up_bias) @ down.T + down_bias
    with torch.no_grad():
        assert torch.allclose(layer.eval()(x), wanted, atol=1e-5)
        run.finish()
        assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert layer.experts.count == 1 and isinstance(layer.experts, MeanExperts)


class Add(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x, t, other):
        assert len(x) == len(t) == len(other)
        return x + self.number + 0 * other


@pytest.mark.parametrize(("stages", "times"), [(4, 1000), (3, 10), (1, 5)])
def test_every_time_has_its_model(stages, times):
    model = TimeStages([Add(100 * i) for i in range(stages)], times)
    t = torch.arange(times)[torch.randperm(times, generator=torch.Generator().manual_seed(0))]
    x = torch.randn(times, 1)
    y = model(x, t, torch.zeros(times, 1))
    wanted = torch.tensor([[100.0 * (int(v) * stages // times)] for v in t])
    assert torch.equal(y, x + wanted)
    for s in range(stages):
        drawn = model.draw(s, 500, torch.Generator().manual_seed(s))
        assert set(model.stage(drawn).tolist()) == {s}
        own = [v for v in range(times) if v * stages // times == s]
        assert int(drawn.min()) == own[0] or times == 1000
    for wrong in (torch.tensor([times]), torch.tensor([-1]), torch.tensor([0.5])):
        with pytest.raises(InvalidArgument, match="integers"):
            model.stage(wrong)
    assert TimeStages([Add(0)] * 4).stage(torch.tensor([249, 250, 999])).tolist() == [0, 1, 3]


def test_the_filter_is_made_of_dft_matrices():
    torch.manual_seed(0)
    layer = SpectralFilter(6, 2, 0.05).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.7)
    x = torch.randn(2, 6, 6, 8, dtype=D)
    rows, columns = (
        torch.exp(-2j * torch.pi * torch.outer(k, k) / len(k)) / len(k) ** 0.5
        for k in (torch.arange(6, dtype=D), torch.arange(8, dtype=D))
    )
    spectrum = rows @ x.to(torch.complex128) @ columns.T
    masked = torch.zeros_like(spectrum)
    w1, w2 = (torch.complex(*p) for p in (layer.first, layer.second))
    b1, b2 = (torch.complex(*p) for p in (layer.first_bias, layer.second_bias))
    leaky = lambda v: v if v > 0 else 0.1 * v  # noqa: E731
    shrunk = lambda v: (abs(v) - 0.05) * (1 if v > 0 else -1) if abs(v) > 0.05 else 0.0  # noqa: E731
    with torch.no_grad():
        for b, h, w in ((b, h, w) for b in range(2) for h in range(6) for w in range(5)):
            for block in range(2):
                v = spectrum[b, block * 3 : block * 3 + 3, h, w]
                z = [complex(c) for c in w1[block] @ v + b1[block, :, 0]]
                z = torch.tensor([complex(leaky(c.real), leaky(c.imag)) for c in z], dtype=w2.dtype)
                z = [complex(c) for c in w2[block] @ z + b2[block, :, 0]]
                m = [complex(shrunk(c.real), shrunk(c.imag)) for c in z]
                m = torch.tensor(m, dtype=w2.dtype)
                masked[b, block * 3 : block * 3 + 3, h, w] = m * v
        found = layer(x) - x
    half = masked[..., :5]
    wanted = torch.zeros(2, 6, 6, 8, dtype=D)
    inner = rows.conj().T @ half
    for n in range(8):
        total = inner[..., 0].real + inner[..., 4].real * (-1) ** n
        for w in (1, 2, 3):
            turn = torch.exp(torch.tensor(2j * torch.pi * w * n / 8, dtype=torch.complex128))
            total = total + 2 * (inner[..., w] * turn).real
        wanted[..., n] = total / 8**0.5
    assert torch.allclose(found, wanted, atol=1e-10)
    assert bool((layer.mask(torch.fft.rfft2(x, norm="ortho")).real == 0).any())
    with pytest.raises(InvalidArgument, match="blocks"):
        SpectralFilter(6, 4)
