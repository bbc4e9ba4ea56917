"""Late rewinding against a plain loop, and the laws of tickets."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.tickets.rewinding import permute_values, permuted_masks

STEPS = 20
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 10, generator=G), torch.randint(0, 3, (64,), generator=G)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def order(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randperm(64, generator=g)[:16] for _ in range(STEPS)]


def rate(step):
    return 0.2 * (1 - step / STEPS)


def fit(model, *, start, seed, first_step):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    start(model, optimizer, STEPS)
    model.train()
    for step, index in enumerate(order(seed)):
        if step >= first_step:
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[index]), Y[index]).backward()
            optimizer.step()


def plain_training(model, masks, first, last, seed=0):
    """SGD with momentum, written out; masked weights are multiplied by 0 after every step."""
    velocity = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    model.train()
    for step, index in list(enumerate(order(seed)))[first:last]:
        loss = nn.functional.cross_entropy(model(X[index]), Y[index])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(model.named_parameters(), gradients):
                gradient = gradient * masks.get(name, 1) + 1e-2 * p
                velocity[name] = 0.9 * velocity[name] + gradient
                p.sub_(rate(step) * velocity[name])
                p.mul_(masks.get(name, 1))
    return model


def plain_rewinding(k, sparsities):
    """The algorithm of the paper on dictionaries; yields (masks, trained model) of every level."""
    names = ["0.weight", "3.weight"]
    total = sum(dict(net().named_parameters())[n].numel() for n in names)
    rewound = plain_training(net(), {}, 0, k)
    masks = {n: torch.ones_like(dict(rewound.named_parameters())[n]) for n in names}
    trained = plain_training(copy.deepcopy(rewound), {}, k, STEPS)
    for sparsity in sparsities:
        weights = dict(trained.named_parameters())
        flat = torch.cat([(weights[n].abs() + masks[n] - 1).detach().flatten() for n in names])
        kept = torch.zeros(total)
        kept[flat.argsort(descending=True)[: total - math.floor(sparsity * total)]] = 1
        masks = {
            n: m.view(masks[n].shape)
            for n, m in zip(names, kept.split([masks[n].numel() for n in names]))
        }
        start = copy.deepcopy(rewound)
        with torch.no_grad():
            for n in names:
                dict(start.named_parameters())[n].mul_(masks[n])
        trained = plain_training(start, masks, k, STEPS)
        yield masks, trained


@pytest.mark.parametrize("k", [0, 4])
def test_every_level_is_that_of_a_plain_loop(k):
    model = net()
    done = sw.experiment(
        fit, model, "rewinding", sparsity=0.7, rounds=3, rewind=k / STEPS, include="*"
    )
    plain = list(plain_rewinding(k, [1 - 0.3 ** (1 / 3), 1 - 0.3 ** (2 / 3), 0.7]))
    for i, (masks, trained) in enumerate(plain):
        level = done.finished[f"level {i + 1}"].into(net())
        record = sw.masks(level)
        for name, mask in masks.items():
            assert torch.equal(record[name], mask.bool())
        for a, b in zip(level.state_dict().values(), trained.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(model.state_dict().values(), level.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pattern, budget", [("unstructured", "global"), ("row", "uniform")])
def test_masks_are_nested_and_of_exactly_the_sparsity(pattern, budget):
    done = sw.experiment(
        fit, net(), "rewinding", sparsity=0.6, share=0.3, pattern=pattern, budget=budget,
        include="*",
    )  # fmt: skip
    levels = [r for n, r in done.finished.items() if n.startswith("level") and n != "level 0"]
    assert len(levels) == 3  # 0.7^2 > 0.4 > 0.7^3
    before = None
    for i, run in enumerate(levels):
        record = sw.masks(run.into(net()))
        wanted = 1 - 0.4 ** ((i + 1) / 3)
        if pattern == "unstructured":
            zeros = sum(int((~m).sum()) for m in record.values())
            assert zeros == math.floor(wanted * (160 + 48) + 1e-9)
        else:
            for mask in record.values():
                columns = mask.shape[1]
                assert ((~mask).sum(1) == math.floor(wanted * columns + 1e-9)).all()
        if before is not None:
            assert all(bool((record[n] <= before[n]).all()) for n in record)
        before = record


def test_the_ticket_starts_exactly_at_the_rewound_weights():
    seen = []

    def watched(model, *, start, seed, first_step):
        if sw.masks(model) is not None:
            seen.append((first_step, copy.deepcopy(model)))
        fit(model, start=start, seed=seed, first_step=first_step)

    done = sw.experiment(watched, net(), "rewinding", sparsity=0.5, rounds=2, rewind=0.2)
    rewound = done.finished["rewind point"].into(net()).state_dict()
    assert len(seen) == 2
    for first_step, model in seen:
        record = sw.masks(model)
        assert first_step == 4
        for name, value in model.state_dict().items():
            wanted = rewound[name] * record[name] if name in record else rewound[name]
            assert torch.equal(value, wanted)


def test_controls_and_stability_are_of_the_ticket():
    def score(model):
        return -nn.functional.cross_entropy(model(X), Y).item()

    done = sw.experiment(
        fit, net(), "rewinding", sparsity=0.5, rounds=1, rewind=0.2, controls=True,
        stability=True, evaluate=score, data=[X],
    )  # fmt: skip
    assert len(done.finished) == 8 and done.result.name == "level 1"
    runs = {n: r.into(net()) for n, r in done.finished.items()}
    ticket = sw.masks(runs["level 1"])
    same = sw.masks(runs["same masks, new values"])
    other = sw.masks(runs["random masks, same values"])
    assert all(torch.equal(ticket[n], same[n]) for n in ticket)
    assert all(ticket[n].sum() == other[n].sum() for n in ticket)
    assert not all(torch.equal(ticket[n], other[n]) for n in ticket)
    a = runs["level 1"][0].weight[ticket["0.weight"]]
    for run, name in (
        ("level 0", "distance to dense"),
        ("second order", "distance between orders"),
    ):
        b = runs[run][0].weight[ticket["0.weight"]]
        assert done.figures[name] == pytest.approx((a - b).pow(2).mean().sqrt().item())
    assert done.figures["barrier between orders"] >= 0


def test_new_values_train_from_the_step_of_the_ticket():
    begun = []

    def watched(model, *, start, seed, first_step):
        begun.append(first_step)
        fit(model, start=start, seed=seed, first_step=first_step)

    sw.experiment(
        watched, net(), "rewinding", sparsity=0.5, rounds=1, rewind=0.2, controls=True
    )  # dense, rewind point, level 0, level 1, new values, random masks
    assert begun == [0, 0, 4, 4, 4, 4]


def test_a_second_call_trains_nothing(tmp_path):
    calls = []

    def counted(model, **given):
        calls.append(given["first_step"])
        fit(model, **given)

    def run(**options):
        return sw.experiment(
            counted,
            net(),
            "rewinding",
            folder=tmp_path,
            about={},
            sparsity=0.5,
            rounds=2,
            **options,
        )

    run(rewind=0.2)
    assert calls == [0, 0, 4, 4, 4]
    run(rewind=0.2)
    assert len(calls) == 5
    run(rewind=0.1)  # the dense training is shared
    assert calls[5:] == [0, 2, 2, 2]


def test_masks_that_the_model_has_are_kept():
    model = net()
    sw.prune(model, "magnitude", sparsity=0.5, include="0.weight")
    before = sw.masks(model)["0.weight"]
    sw.experiment(fit, model, "rewinding", sparsity=0.25, rounds=1, include="3.weight")
    record = sw.masks(model)
    assert torch.equal(record["0.weight"], before) and record.violations(model) == {}
    assert record.sparsity("3.weight") == 0.25 and record.method == "rewinding"
    sw.experiment(fit, model, "rewinding", sparsity=0.75, rounds=2, include="*")
    assert all(bool((sw.masks(model)[n] <= record[n]).all()) for n in record)
    with pytest.raises(InvalidArgument, match="already masked"):
        sw.experiment(fit, model, "rewinding", sparsity=0.1, rounds=1, include="*")


def test_permuted_values_and_masks_keep_their_numbers():
    model, before = net(), net()
    permute_values(model, 3)
    again = net()
    permute_values(again, 3)
    for (name, a), b, c in zip(model.named_parameters(), before.parameters(), again.parameters()):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values), name
        assert torch.equal(a, c)
    assert not torch.equal(model[0].weight, before[0].weight)
    record = sw.Masks.of({"0.weight": before[0].weight > 0.1})
    moved = permuted_masks(record, 3)
    assert moved["0.weight"].sum() == record["0.weight"].sum()
    assert not torch.equal(moved["0.weight"], record["0.weight"])


def test_bad_options_are_refused():
    for options in ({"rewind": 1.0}, {"share": 0.0}, {"rounds": 0}, {}):
        with pytest.raises(InvalidArgument, match="rewinding"):
            sw.experiment(fit, net(), "rewinding", sparsity=None if not options else 0.5, **options)
