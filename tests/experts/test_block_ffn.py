"""BlockFFN against loops over tokens and chunks in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sparseworks as sw
import tiny_models
from sparseworks.core.errors import InvalidArgument
from sparseworks.experts.banks import Experts
from sparseworks.experts.block_ffn import BlockFFN, ReLURouter, chunk_loss, locality_loss
from sparseworks.experts.chunks import chunk_sparsity, token_information
from sparseworks.experts.layers import MoE


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v > -700 else 0.0


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_routing_is_relu_and_rms_over_all_experts():
    g = torch.Generator().manual_seed(0)
    router = ReLURouter(5, 7, generator=g).double()
    with torch.no_grad():
        router.gain.copy_(torch.arange(1.0, 6.0))
        router.weight[:, 0] = -1
    x = inputs(2, 6, 7)
    x[0, 0] = torch.eye(7, dtype=torch.float64)[0]  # every logit below 0: no expert
    found = router(x)
    for b in range(2):
        for t in range(6):
            a = [max(0.0, (router.weight[i] @ x[b, t]).item()) for i in range(5)]
            rms = math.sqrt(sum(v * v for v in a) / 5)
            for i in range(5):
                wanted = (i + 1) * a[i] / rms if rms else 0.0
                assert found.weights[b, t, i].item() == pytest.approx(wanted, abs=1e-12)
                share = a[i] / (sum(a) + 1e-5)
                assert found.probabilities[b, t, i].item() == pytest.approx(share, abs=1e-12)
                assert bool(found.chosen[b, t, i]) == (a[i] > 0)
    assert not found.chosen[0, 0].any() and not found.weights[0, 0].any()


def test_skipped_equals_dense():
    g = torch.Generator().manual_seed(0)
    bank = Experts(6, 7, 4, gated=False, generator=g)
    layer = MoE(ReLURouter(6, 7, generator=g), bank, dense=True).double()
    x = inputs(3, 5, 7)
    dense = layer(x)
    layer.dense = False
    torch.testing.assert_close(layer(x), dense, rtol=1e-10, atol=1e-12)
    assert 0 < layer.load.active < 6


def test_locality_is_its_formula_and_reaches_both_tokens():
    kappa = 3.0
    z = inputs(2, 4, 3).requires_grad_()
    total = 0.0
    for b in range(2):
        for t in range(1, 4):
            for i in range(3):
                own, goal = kappa * z[b, t, i].item(), sigmoid(kappa * z[b, t - 1, i].item())
                total -= goal * math.log(sigmoid(own)) + (1 - goal) * math.log(sigmoid(-own))
    loss = locality_loss(z, kappa)
    assert loss.item() == pytest.approx(total / 18)
    (grad,) = torch.autograd.grad(loss, z)
    slope = (kappa * z[:, 0]).sigmoid()
    wanted = -kappa * z[:, 1] * slope * (1 - slope) * kappa / 18  # through the target alone
    torch.testing.assert_close(grad[:, 0], wanted.detach())
    assert grad[:, 3].any()


@pytest.mark.parametrize("length", [1, 3, 5, 8])
def test_chunk_loss_is_its_formula(length):
    p = inputs(2, 7, 4).softmax(-1)
    total, count = 0.0, 0
    for b in range(2):
        for start in range(0, 7, length):
            for i in range(4):
                logs = sum(math.log(1 - p[b, t, i].item() + 1e-5)
                           for t in range(start, min(7, start + length)))  # fmt: skip
                logs += max(0, start + length - 7) * math.log(1 + 1e-5)
                total, count = total + 1 - math.exp(logs), count + 1
    assert chunk_loss(p, length).item() == pytest.approx(total / count)


def test_chunk_sparsity_is_its_formula_and_falls_with_the_length():
    chosen = inputs(2, 12, 5) > 0.8
    found = [chunk_sparsity(chosen, m) for m in (1, 2, 3, 4, 6, 12)]
    assert found[0] == pytest.approx(1 - chosen.double().mean().item())
    unions = [chosen[b, s : s + 3, i].any().item()
              for b in range(2) for s in range(0, 12, 3) for i in range(5)]  # fmt: skip
    assert found[2] == pytest.approx(1 - sum(unions) / len(unions))
    assert all(a >= b for a, b in zip(found[::2], found[1::2]))
    with pytest.raises(InvalidArgument):
        chunk_sparsity(chosen, 13)


def test_information_is_zero_for_constant_and_entropy_for_one_to_one_routing():
    tokens = torch.arange(40) % 4
    assert token_information(tokens, torch.zeros(40, dtype=torch.long)) == pytest.approx(0)
    assert token_information(tokens, 3 - tokens) == pytest.approx(math.log(4))


class Job:
    def __init__(self) -> None:
        self.step, self.own, self.layers = 0, {}, {}


def test_the_factor_adapts_by_windows():
    method = BlockFFN(chunks=0.1, warmup=2, window=2)
    job, factors = Job(), []
    for mean in (1.0, 0.5, 0.51, 10.0):  # of windows of two steps
        for _ in range(2):
            factors.append(method.factor(job))  # type: ignore[arg-type]
            job.own["seen"] = mean
            job.step += 1
            method.update(job)  # type: ignore[arg-type]
    factors.append(method.factor(job))  # type: ignore[arg-type]
    job.step += 2
    last = method.factor(job)  # type: ignore[arg-type]
    # after four steps halved, over two steps; then 1.02 counts as 1.025; then the cap of four times
    wanted = [0.1, 0.1, 0.1, 0.1, 0.1, 0.075, 0.05, 0.050625, 0.05125]
    assert factors == pytest.approx(wanted) and last == pytest.approx(0.4)


def test_a_split_start_and_the_end_of_training():
    model = tiny_models.language_model()
    run = sw.upcycle(model, "blockffn", experts=6, start="split")
    layer = run.layers["model.layers.0.mlp"]
    assert layer.experts.hidden == 8 and layer.dense
    run.finish()
    assert not layer.dense
    for bad in ({"hidden": 0}, {"locality": -1.0}, {"start": "copies"}, {"window": 0}):
        with pytest.raises(InvalidArgument):
            BlockFFN(**bad)
