"""DCT-AdamW against its algorithm written plainly in fp64, and its bases against SciPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.fft
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.solvers.dct_adamw import DCTAdamW
from sparseworks.solvers.subspaces import basis, capture, dct, largest, transform_columns
from sparseworks.training.checkpointing import load_state, save_state


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 64, 301])
def test_the_fast_transform_is_the_matrix_and_that_of_scipy(n):
    a = torch.randn(5, n, dtype=torch.float64)
    q = basis("dct", n, torch.float64, a.device)
    wanted = torch.from_numpy(scipy.fft.dct(a.numpy(), norm="ortho", axis=1))
    torch.testing.assert_close(dct(a), wanted)
    torch.testing.assert_close(a @ q, wanted)
    torch.testing.assert_close(q.t() @ q, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(transform_columns(a, q, "dct"), wanted)


def test_the_largest_columns_are_the_best_ones_of_the_basis():
    a = torch.randn(9, 6, dtype=torch.float64)
    q = basis("random", 6, torch.float64, a.device)
    chosen = largest(a @ q, 3, "l2")
    import itertools

    errors = {
        c: float((a - a @ q[:, list(c)] @ q[:, list(c)].t()).square().sum())
        for c in itertools.combinations(range(6), 3)
    }
    assert min(errors, key=errors.get) == tuple(chosen.tolist())
    kept = capture(a, "random", 3)
    assert kept == pytest.approx(1 - min(errors.values()) / float(a.square().sum()))
    assert capture(a, "svd", 3) >= kept >= 3 / 6 >= 0
    assert capture(a, "dct", 6) == pytest.approx(1)


def plain(weight, gradients, *, rank, every=1, kind="dct", norm="l1", feedback=False, rotate=False,
          lr=0.01, decay=0.1, b1=0.9, b2=0.999, eps=1e-8):  # fmt: skip
    """The card's algorithm in numpy, with a rotation matrix and no shortcuts."""
    w = weight.numpy().copy()
    right = w.shape[0] >= w.shape[1]
    n = min(w.shape)
    q = basis(kind, n, torch.float64, torch.device("cpu")).numpy() if kind != "svd" else None
    error, m, v, columns = np.zeros_like(w if right else w.T), None, None, None
    for t, g in enumerate(gradients, 1):
        a = (g.numpy() if right else g.numpy().T) + (error if feedback else 0)
        if t == 1 or t % every == 0:
            before = columns
            if kind == "svd":
                v_t = torch.linalg.svd(torch.from_numpy(a), full_matrices=False)[2]  # same signs
                columns = v_t[:rank].t().numpy()
            else:
                s = a @ q
                size = np.abs(s).sum(0) if norm == "l1" else (s**2).sum(0)
                chosen = np.sort(np.argsort(-size, kind="stable")[:rank])
                columns = q[:, chosen]
            if rotate and m is not None:
                turn = before.T @ columns
                m, v = m @ turn, np.abs(v @ turn)
        small = a @ columns
        error = a - small @ columns.T
        m = (0 if m is None else b1 * m) + (1 - b1) * small
        v = (0 if v is None else b2 * v) + (1 - b2) * small**2
        u = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        step = u @ columns.T
        w = w * (1 - lr * decay) - lr * (step if right else step.T)
    return torch.from_numpy(w)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7), (300, 260)])
@pytest.mark.parametrize("options", [
    {}, {"norm": "l2"}, {"every": 3}, {"rotate": True}, {"feedback": "full"}, {"basis": "random"},
    {"every": 2, "rotate": True, "feedback": "full", "norm": "l2"},
])  # fmt: skip
def test_steps_are_the_algorithm_written_plainly(shape, options):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=g, dtype=torch.float64)
    gradients = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(7)]
    p = nn.Parameter(weight.clone())
    optimizer = DCTAdamW([p], 0.01, weight_decay=0.1, rank=3, **options)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(p.grad, gradient), "the gradient is the caller's"
    more = {k: v for k, v in options.items() if k not in ("basis", "feedback")}
    wanted = plain(weight, gradients, rank=3, kind=options.get("basis", "dct"),
                   feedback="feedback" in options, **more)  # fmt: skip
    torch.testing.assert_close(p.detach(), wanted)


@pytest.mark.parametrize("rotate", [False, True])
def test_the_svd_is_galore(rotate):
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 5, generator=g, dtype=torch.float64)
    gradients = [torch.randn(8, 5, generator=g, dtype=torch.float64) for _ in range(6)]
    p = nn.Parameter(weight.clone())
    optimizer = DCTAdamW([p], 0.01, weight_decay=0.1, rank=2, basis="svd", every=3, rotate=rotate)
    for gradient in gradients:
        p.grad = gradient
        optimizer.step()
    wanted = plain(weight, gradients, rank=2, kind="svd", every=3, rotate=rotate)
    torch.testing.assert_close(p.detach(), wanted)


def test_everything_else_gets_adamw_bit_by_bit_of_the_formula():
    torch.manual_seed(0)
    tensors = [torch.randn(s) for s in ((7,), (2, 3, 4), (40, 6), (5, 2))]
    mine = [nn.Parameter(t.clone()) for t in tensors]
    theirs = [nn.Parameter(t.clone()) for t in tensors]
    a = DCTAdamW(mine, 0.01, weight_decay=0.1, rank=2, largest=40)
    b = torch.optim.AdamW(theirs, 0.01, weight_decay=0.1)
    for _ in range(4):
        for p, q in zip(mine, theirs):
            p.grad = q.grad = torch.randn_like(p)
        a.step()
        b.step()
    for p, q in zip(mine, theirs):
        torch.testing.assert_close(p, q)


def test_state_is_what_is_promised():
    p = nn.Parameter(torch.randn(64, 48))
    for feedback, extra in (("none", 0), ("full", 64 * 48 * 4), ("8bit", 64 * 48 + 64 * 4)):
        optimizer = DCTAdamW([p], rank=0.25, feedback=feedback)
        p.grad = torch.randn(64, 48)
        optimizer.step()
        state = optimizer.state[p]
        used = sum(t.numel() * t.element_size() for t in state.values() if torch.is_tensor(t))
        assert used == 2 * 64 * 12 * 4 + 12 * 4 + extra


def test_eight_bits_of_feedback_are_near_the_whole():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 20, generator=g)
    pair = [nn.Parameter(weight.clone()) for _ in range(2)]
    both = [DCTAdamW([p], 0.01, rank=5, feedback=f) for p, f in zip(pair, ("full", "8bit"))]
    for _ in range(10):
        gradient = torch.randn(30, 20, generator=g)
        for p, optimizer in zip(pair, both):
            p.grad = gradient.clone()
            optimizer.step()
    whole, rounded = (o.state[p]["error"] for o, p in zip(both, pair))
    error = rounded.float() * both[1].state[pair[1]]["error_scale"]
    assert (error - whole).norm() < 0.2 * whole.norm()
    assert (pair[0] - pair[1]).norm() < 0.3 * (pair[0] - weight).norm()


def test_resuming_is_bit_for_bit_in_bf16_too(tmp_path):
    def begun(dtype):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(300, 280), nn.Linear(280, 4)).to(dtype)
        return net, DCTAdamW(net.parameters(), 0.01, rank=32, feedback="8bit", rotate=True, every=2)

    def steps(net, optimizer, first, last):
        for i in range(first, last):
            x = torch.randn(6, 300, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            net(x.to(net[0].weight.dtype)).square().mean().backward()
            optimizer.step()

    for dtype in (torch.float32, torch.bfloat16):
        net, optimizer = begun(dtype)
        steps(net, optimizer, 0, 5)
        weights = copy.deepcopy(net.state_dict())
        save_state(tmp_path / "state.safetensors", optimizer.state_dict())
        steps(net, optimizer, 5, 9)
        other, again = begun(dtype)
        other.load_state_dict(weights)
        again.load_state_dict(load_state(tmp_path / "state.safetensors"))
        steps(other, again, 5, 9)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
        assert again.state[other[0].weight]["chosen"].dtype == torch.int32


def test_it_learns_and_a_schedule_moves_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.randn(256, 16)
    y = torch.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    optimizer = sw.optimizer(net.parameters(), "dct-adamw", lr=0.02, rank=4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, 200, cycle_momentum=False)
    first = float(y.square().mean())
    for _ in range(200):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert float(loss.detach()) < 0.2 * first and optimizer.param_groups[0]["lr"] < 1e-5


def test_bad_options_are_refused():
    p = [nn.Parameter(torch.zeros(3, 3))]
    for options, match in (
        ({"basis": "fft"}, "basis"), ({"norm": "max"}, "norm"), ({"feedback": "4bit"}, "feedback"),
        ({"rank": 0}, "rank"), ({"every": 0}, "every"), ({"betas": (1.0, 0.9)}, "betas"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=match):
            DCTAdamW(p, 0.1, **options)
    with pytest.raises(InvalidArgument, match="no option"):
        sw.optimizer(p, "dct-adamw", lr=0.1, ranks=3)
    with pytest.raises(InvalidArgument, match=r"sw\.optimizer"):
        sw.prune(nn.Linear(3, 3), "dct-adamw", sparsity=0.5)
