"""Straight-through training: the laws of the swap, whatever a method adds to it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.patterns import NM
from sparseworks.kernels.nm import pack_nm, unpack_nm
from sparseworks.models.views import find_prunable

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}
METHODS = {
    "sr-ste": {"decay": 0.05},
    "mdgf": {"final": 0.25},
    "sdgf": {"dense": 0.25},
    "bdwp": {"decay": 0.05},
    "ast": {"decay": 0.05, "every": 3},
}
STEPS = 12


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 16, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, 4, 4, generator=g), torch.randint(0, 5, (8,), generator=g)


def train(model, optimizer, first=0, last=STEPS, after=lambda: None, parts=1):
    for step in range(first, last):
        optimizer.zero_grad()
        x, y = batch(step)
        for a, b in zip(x.chunk(parts), y.chunk(parts)):
            (nn.functional.cross_entropy(model(a), b) / parts).backward()
        optimizer.step()
        after()


def start(method, optimizer="adamw", model=None, **options):
    model = net() if model is None else model
    made = OPTIMIZERS[optimizer](model.parameters())
    given = {"pattern": "2:4", "steps": STEPS, **METHODS[method], **options}
    return model, made, sw.sparsify(model, made, method, **given)


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:8", "5:8", "3:16", "1:16"])
@pytest.mark.parametrize("method", ["sr-ste", "bdwp", "ast"])
def test_every_group_keeps_n_at_every_step_and_the_packed_form_is_the_weight(method, pattern):
    n, m = map(int, pattern.split(":"))
    model, optimizer, run = start(method, pattern=pattern)
    views = find_prunable(model).by_name()
    assert set(run.masks) == {"0.weight", "4.weight"}

    def check():
        for name, mask in run.masks.items():
            view = views[name]
            groups = view.matrix(mask).reshape(-1, m)
            assert bool((groups.sum(1) == n).all())
            weight = view.matrix(view.parameter).detach()
            assert bool((weight[~view.matrix(mask)] == 0).all())
            assert bool((view.matrix(run.weight(name))[~view.matrix(mask)] != 0).any())
            packed = pack_nm(weight.contiguous(), view.matrix(mask).contiguous(), (n, m))
            assert torch.equal(unpack_nm(packed), weight)

    check()
    train(model, optimizer, after=check)
    assert run.step == STEPS
    before = copy.deepcopy(model)
    record = run.finish()
    check()
    assert same(before, model) and type(model[0]) is nn.Conv2d and type(model[4]) is nn.Linear
    assert sw.masks(model).violations(model) == {} and record.sparsity() == 1 - n / m


def test_the_groups_of_a_convolution_are_channels_at_one_tap():
    _model, _, run = start("sr-ste")
    weight, mask = run.weight("0.weight"), run.masks["0.weight"]
    for out, row, column in ((0, 0, 0), (31, 2, 1)):
        for first in range(0, 16, 4):
            group = weight[out, first : first + 4, row, column].abs()
            kept = mask[out, first : first + 4, row, column]
            assert set(kept.nonzero().flatten().tolist()) == set(group.topk(2).indices.tolist())


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("method", ["sr-ste", "mdgf", "sdgf", "bdwp"])
def test_n_of_n_is_dense_training_bit_for_bit(method, optimizer):
    if method == "sdgf":
        options = {"pattern": "4:4", "frames": "4:4"}
    else:
        options = {"pattern": "4:4"}
    model, made, run = start(method, optimizer, **options)
    plain = net()
    train(plain, OPTIMIZERS[optimizer](plain.parameters()))
    train(model, made)
    run.finish()
    if method == "bdwp":  # its products have their own order of sums
        for a, b in zip(plain.parameters(), model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    else:
        assert same(plain, model)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_resuming_is_exact(method):
    model, made, run = start(method)
    train(model, made, 0, 5)
    saved = copy.deepcopy((model.state_dict(), made.state_dict(), run.state_dict()))
    train(model, made, 5, STEPS)
    run.finish()
    again, other, resumed = start(method)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(again, other, 5, STEPS)
    resumed.finish()
    assert same(model, again)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_accumulated_batches_are_one_batch(method):
    found = []
    for parts in (1, 4):
        model, made, _run = start(method, model=net().double().eval())
        for step in range(4):
            made.zero_grad()
            x, y = batch(step)
            for a, b in zip(x.double().chunk(parts), y.chunk(parts)):
                (nn.functional.cross_entropy(model(a), b) / parts).backward()
            made.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_closure_is_called_with_sparse_layers(method):
    model, made, _run = start(method)
    train(model, made)
    other, optimizer, second = start(method)
    views = find_prunable(other).by_name()
    for step in range(STEPS):
        x, y = batch(step)

        def closure(x=x, y=y):
            if method in ("sr-ste", "ast", "bdwp"):
                for name, mask in second.masks.items():
                    assert bool((views[name].parameter[~mask] == 0).all())
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(other(x), y)
            loss.backward()
            return loss

        optimizer.step(closure) if step % 2 else optimizer.step(closure=closure)
    assert same(model, other)


def test_an_optimizer_that_calls_its_closure_often_sees_sparse_layers_every_time():
    model = nn.Linear(8, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    run = sw.sparsify(model, optimizer, "sr-ste", include="*", decay=0.0)
    x, losses, calls = torch.randn(32, 8), [], 0
    y = x @ torch.randn(8, 4)

    def closure():
        nonlocal calls
        calls += 1
        assert bool((model.weight[~run.masks["weight"]] == 0).all())
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        losses.append(float(optimizer.step(closure).detach()))
    assert calls > 10 and losses[-1] < losses[0]


def test_loss_scaling_changes_nothing():
    models = []
    for scaled in (False, True):
        model, made, _run = start("sr-ste", "sgd")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(STEPS):
            made.zero_grad()
            x, y = batch(step)
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(made)
            scaler.update()
        models.append(model)
    assert same(*models)


def test_a_fused_optimizer_that_unscales_itself_gets_a_scaled_term():
    models = []
    for scaled in (False, True):
        model = net()
        made = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, fused=True)
        run = sw.sparsify(model, made, "sr-ste", decay=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(4):
            made.zero_grad()
            x, y = batch(step)
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(made)
            scaler.update()
        models.append([run.weight(n).clone() for n in run.masks])
    for a, b in zip(*models):
        torch.testing.assert_close(a, b)


def test_a_step_with_overflow_changes_nothing():
    model, made, run = start("sr-ste")
    before = copy.deepcopy(model.state_dict()), {n: run.weight(n).clone() for n in run.masks}
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model[4].weight.sum() * float("inf")).backward()
    scaler.step(made)
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, run.weight(n)) for n, v in before[1].items()) and run.step == 0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_layers_compile_without_a_break(method):
    model, made, run = start(method)
    other, optimizer, second = start(method)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    train(model, made, 0, 4)
    train(compiled, optimizer, 0, 4)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(m, second.masks[n]) for n, m in run.masks.items())


def test_two_optimizers_in_turn():
    model = net()
    first = torch.optim.SGD(model[0].parameters(), 0.05)
    second = torch.optim.Adam([*model[1].parameters(), *model[4:].parameters()], 0.01)
    run = sw.sparsify(model, [first, second], "sr-ste")
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    first.step()
    assert run.step == 0
    assert all(bool((run.parameters[n][~m] == 0).all()) for n, m in run.masks.items())
    second.step()
    assert run.step == 1
    assert all(bool((run.parameters[n][~m] == 0).all()) for n, m in run.masks.items())


def test_what_is_written_between_steps_counts():
    model, made, run = start("sr-ste", "sgd")
    train(model, made, 0, 2)
    kept = {n: run.weight(n).clone() for n in run.masks}
    swapped = copy.deepcopy(model.state_dict())
    model.load_state_dict({k: v * 0 for k, v in swapped.items()})
    model.load_state_dict(swapped)  # an average swapped in and out again
    for group in made.param_groups:
        group.update(lr=0.0)
    train(model, made, 2, 3)
    assert all(torch.equal(run.weight(n), kept[n]) for n in run.masks)
    fresh = torch.randn_like(model[4].weight)
    with torch.no_grad():
        model[4].weight.copy_(fresh)
    train(model, made, 3, 4)
    assert torch.equal(run.weight("4.weight"), fresh)
    expected = NM(2, 4).select(fresh.abs())
    assert torch.equal(model[4].weight, fresh * expected)


def test_layers_that_cannot_take_the_pattern_are_named():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Conv2d(12, 4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = sw.sparsify(model, optimizer, "sr-ste", include="*", pattern="2:4")
    assert set(run.masks) == {"1.weight", "2.weight"}
    assert "multiple of 4, not 3" in run.skipped["0.weight"]
    run.remove()
    with pytest.raises(ModelError, match="outputs to be a multiple of 8 too, not 12"):
        sw.sparsify(model, optimizer, "bdwp", include="1", pattern="2:8")


@pytest.mark.parametrize(
    "method,options,message",
    [
        ("sr-ste", {"sparsity": 0.9}, "contradicts"),
        ("sr-ste", {"decay": float("nan")}, "finite"),
        ("sr-ste", {"pattern": "unstructured"}, "needs `sparsity`"),
        ("mdgf", {"steps": None}, "give `steps`"),
        ("mdgf", {"dense": 0.7, "final": 0.7}, "more than 1"),
        ("mdgf", {"decay": "cosine"}, "decay='cosine'"),
        ("sdgf", {"frames": "3:4,1:4"}, "last is 2:4"),
        ("sdgf", {"pattern": "unstructured", "sparsity": 0.5}, "not to unstructured"),
        ("bdwp", {"backward": "both"}, "backward='both'"),
        ("bdwp", {"pattern": "unstructured", "sparsity": 0.5}, "N:M pattern"),
        ("ast", {"every": 0}, "every=0"),
        ("ast", {"steps": None}, "give `steps`"),
    ],
)
def test_misuse_changes_nothing(method, options, message):
    model = net()
    before = copy.deepcopy(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(InvalidArgument, match=message):
        sw.sparsify(model, optimizer, method, **{"pattern": "2:4", "steps": STEPS, **options})
    assert same(model, before) and not optimizer._optimizer_step_pre_hooks
    assert all(type(a) is type(b) for a, b in zip(model.modules(), before.modules()))


def test_rules_need_adam_and_weights_need_full_precision():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InvalidArgument, match="SGD is none"):
        sw.sparsify(model, sgd, "ast", steps=STEPS)
    sw.sparsify(model, sgd, "ast", steps=STEPS, term="gradient").remove()
    half = net().bfloat16()
    with pytest.raises(InvalidArgument, match="fp32"):
        sw.sparsify(half, torch.optim.SGD(half.parameters(), 0.1), "sr-ste")


def test_a_training_that_diverges_is_named():
    model, made, _run = start("sr-ste", "sgd")
    model(batch(0)[0]).sum().backward()
    model[4].weight.grad[0, 0] = float("nan")
    with pytest.raises(InvalidArgument, match=r"4\.weight after step 1.*learning rate"):
        made.step()


def test_unstructured_masks_take_the_budget():
    model, made, run = start("sr-ste", pattern="unstructured", sparsity=0.8, budget="global")
    train(model, made)
    total = sum(m.numel() for m in run.masks.values())
    assert sum(int(m.sum()) for m in run.masks.values()) == total - int(0.8 * total)
