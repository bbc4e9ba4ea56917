"""BiP: its gradient against a solved lower problem, its turns, and its masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.dynamic.bip import BilevelMask, BiP


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 16),
        nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


def start(model, momentum=0.9, **options):
    job = sw.transform(model, "bip", sparsity=0.8, **options)
    groups = job.parameter_groups(lr=0.5)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=momentum, weight_decay=0.01)
    return job.attach(optimizer), optimizer


def step(model, optimizer, g, set_to_none=True):
    x, y = torch.randn(16, 3, 6, 6, generator=g), torch.randint(0, 5, (16,), generator=g)
    optimizer.zero_grad(set_to_none=set_to_none)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def gradients(weight, scores, mask, loss, inverse_gamma, term):
    """Those of the part, for a loss of z."""
    part = BilevelMask(scores, inverse_gamma, term)
    part.mask.copy_(mask)
    theta = weight.clone().requires_grad_()
    loss(part(theta)).backward()
    return theta.grad, part.scores.grad


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(4)
    n = 12
    a = torch.randn(n, n, generator=g, dtype=torch.float64)
    hessian, b = a @ a.T / n, torch.randn(n, generator=g, dtype=torch.float64)
    mask = torch.rand(n, generator=g) < 0.6
    return hessian, b, mask


def test_the_gradient_is_that_of_a_solved_lower_problem(problem):
    """Quadratic loss, gamma large: differentiate loss(m * theta*(m)) through the exact solution."""
    hessian, b, mask = problem
    gamma = 200.0
    n = len(b)

    def loss(z):
        return 0.5 * z @ hessian @ z - b @ z

    m = mask.double().requires_grad_()
    solved = torch.linalg.solve(
        m[:, None] * hessian * m[None, :] + gamma * torch.eye(n, dtype=torch.float64), m * b
    )
    (exact,) = torch.autograd.grad(loss(m * solved), m)
    theta = solved.detach()
    scores = torch.ones(n, dtype=torch.float64)
    _, ours = gradients(theta, scores, mask, loss, 1 / gamma, "formula")
    _, without = gradients(theta, scores, mask, loss, 0.0, "none")
    kept = mask  # at m = 0 theta* is 0, and so is every first-order gradient
    assert float((ours - exact)[kept].norm() / exact[kept].norm()) < 0.05
    assert float((without - exact)[kept].norm() / exact[kept].norm()) > 0.4


def test_terms_and_signs(problem):
    hessian, b, mask = problem
    g = torch.Generator().manual_seed(1)
    theta = torch.randn(len(b), generator=g, dtype=torch.float64)
    scores = torch.randn(len(b), generator=g, dtype=torch.float64)

    def loss(z):
        return 0.5 * z @ hessian @ z - b @ z

    gz = hessian @ (mask * theta) - b
    sign = torch.where(scores < 0, -1.0, 1.0)
    c = 0.3
    expected = {
        "formula": (theta - c * mask * gz) * gz * sign,
        "released": (theta * gz - c * (theta * gz) ** 2) * sign,
        "none": theta * gz * sign,
    }
    for term, value in expected.items():
        for_theta, for_scores = gradients(theta, scores, mask, loss, c, term)
        torch.testing.assert_close(for_scores, value)
        torch.testing.assert_close(for_theta, mask * gz)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("lower", [1, 2])
def test_weights_and_scores_take_turns(lower, set_to_none):
    model = net()
    job, optimizer = start(model, lower=lower)
    g = torch.Generator().manual_seed(0)
    size = {n: m.numel() for n, m in job.masks.items()}
    kept = sum(int(m.sum()) for m in job.masks.values())
    moved_masks = 0
    for t in range(1, 10):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        masks = {n: m.clone() for n, m in job.masks.items()}
        step(model, optimizer, g, set_to_none)
        upper = t % (lower + 1) == 0
        for name, parameter in model.named_parameters():
            trained = not torch.equal(parameter, before[name])
            assert trained == (("scores" in name) == upper), (t, name)
        assert sum(int(m.sum()) for m in job.masks.values()) == kept
        same = all(torch.equal(masks[n], job.masks[n]) for n in masks)
        assert same or upper
        moved_masks += not same
    assert moved_masks > 0
    assert kept == sum(size.values()) - int(0.8 * sum(size.values()))


def test_the_first_mask_is_magnitude_and_scores_are_a_copy():
    model = net()
    magnitude = sw.prune(net(), "magnitude", sparsity=0.8, budget="global").masks
    job, optimizer = start(model)
    assert all(torch.equal(job.masks[n], magnitude[n]) for n in magnitude)
    scores = {n: p.clone() for n, p in job.added.items()}
    step(model, optimizer, torch.Generator().manual_seed(0))
    assert all(torch.equal(p, scores[n]) for n, p in job.added.items())


def test_finish_and_resume():
    model = net()
    model[4].bias.requires_grad_(False)  # frozen by the user: stays so
    bias = model[4].bias.clone()
    job, optimizer = start(model)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        step(model, optimizer, g)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), job.state_dict()))
    other = net(seed=3)
    other[4].bias.requires_grad_(False)
    resumed, again = start(other)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    other_g = g.clone_state()
    for _ in range(3):
        step(model, optimizer, g)
        step(other, again, other_g)
    job.finish(), resumed.finish()
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert torch.equal(model[4].bias, bias) and not model[4].bias.requires_grad
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "4.bias")
    assert sw.masks(model).violations(model) == {}
    assert abs(sw.masks(model).sparsity() - 0.8) < 1e-3


def test_whole_filters():
    model = net()
    job, optimizer = start(model, pattern="rows", budget="uniform", include=["0", "4"])
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        step(model, optimizer, g)
    for mask in job.finish().values():
        rows = mask.flatten(1).float().mean(1)
        assert bool(((rows == 0) | (rows == 1)).all())


def test_scores_alone_leave_the_weights():
    model, plain = net(), net()
    job, optimizer = start(model, lower=0, term="none")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in job.added.values()}
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        step(model, optimizer, g)
    record = job.finish()
    for name, value in plain.named_parameters():
        kept = torch.where(record[name], value, 0.0) if name in record else value
        assert torch.equal(model.get_parameter(name), kept)


def test_no_layer_is_emptied():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    job, _ = start(model)
    assert int(job.masks["0.weight"].sum()) == 1
    total = sum(m.numel() for m in job.masks.values())
    assert sum(int(m.sum()) for m in job.masks.values()) == total - int(0.8 * total)


def test_half_precision_keeps_fine_scores():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).bfloat16()
    job = sw.transform(model, "bip", sparsity=0.8, include="*")
    optimizer = torch.optim.SGD(job.parameter_groups(), lr=0.1)
    job.attach(optimizer)
    assert all(p.dtype == torch.float32 for p in job.added.values())
    before = {n: p.detach().clone() for n, p in job.added.items()}
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 16).bfloat16()).float().square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in job.added.items())
    job.finish()
    assert model[0].weight.dtype == torch.bfloat16 and sw.masks(model).violations(model) == {}


def test_several_processes_are_refused(tmp_path):
    """Ranks would drift apart: DDP does not reduce what was frozen when it was made."""
    import torch.distributed as dist

    model = net()
    before = list(model.state_dict())
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        start(net())  # a group of one is no matter
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_world_size", lambda: 2)
            with pytest.raises(InvalidArgument, match="several processes"):
                start(model)
    finally:
        dist.destroy_process_group()
    assert list(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_misuse_is_refused():
    for bad in ({"term": "other"}, {"inverse_gamma": -1.0}, {"lower": -1}):
        with pytest.raises(InvalidArgument, match="bip"):
            BiP(**bad)
