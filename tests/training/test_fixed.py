"""Fine-tuning from a mask record: the zeros stay, the rest trains as it would."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


def steps(model, optimizer, count, check=lambda: None, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x, y = torch.randn(8, 3, 8, 8, generator=g), torch.randint(0, 5, (8,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        check()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_zero_stays_zero_at_every_step(name):
    model = net()
    sw.prune(model, "magnitude", sparsity=0.7, include="*")
    record = sw.masks(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = OPTIMIZERS[name](model.parameters())
    run = sw.sparsify(model, optimizer, "fixed")

    def check():
        assert record.violations(model) == {}
        for key, mask in record.items():
            for value in optimizer.state[dict(model.named_parameters())[key]].values():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    assert bool((value[~mask] == 0).all())

    steps(model, optimizer, 5, check)
    run.finish()
    assert sw.masks(model).violations(model) == {}
    assert all(torch.equal(sw.masks(model)[k], record[k]) for k in record)
    kept = record["0.weight"]
    assert not torch.equal(model[0].weight[kept], before["0.weight"][kept])
    steps(model, optimizer, 1)  # the hooks are gone: free to train on
    assert sw.masks(model).violations(model) != {}


def test_all_kept_equals_plain_training_bit_for_bit():
    plain, masked = net(), net()
    sw.prune(masked, "magnitude", sparsity=0.0)
    first = OPTIMIZERS["adamw"](plain.parameters())
    second = OPTIMIZERS["adamw"](masked.parameters())
    run = sw.sparsify(masked, second, "fixed")
    steps(plain, first, 4)
    steps(masked, second, 4)
    run.finish()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(),
                                                 masked.state_dict().values()))  # fmt: skip


def test_going_on_from_saved_state_is_exact():
    model = net()
    sw.prune(model, "magnitude", sparsity=0.5)
    whole = copy.deepcopy(model)
    optimizer = OPTIMIZERS["sgd"](whole.parameters())
    sw.sparsify(whole, optimizer, "fixed")
    steps(whole, optimizer, 3)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    steps(whole, optimizer, 2, seed=9)
    other = copy.deepcopy(model)
    other.load_state_dict(saved[0])
    again = OPTIMIZERS["sgd"](other.parameters())
    again.load_state_dict(saved[1])
    sw.sparsify(other, again, "fixed")
    steps(other, again, 2, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(),
                                                 other.state_dict().values()))  # fmt: skip


def test_infinite_gradients_of_masked_weights_do_not_matter():
    model = nn.Linear(2, 1, bias=False)
    sw.prune(model, "magnitude", sparsity=0.5, include="*")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sw.sparsify(model, optimizer, "fixed")
    masked = int((~sw.masks(model)["weight"]).nonzero()[0, 1])
    x = torch.ones(1, 2)
    x[0, masked] = float("inf")
    (model.weight * x).sum().backward()
    assert bool(torch.isfinite(model.weight.grad).all())
    optimizer.step()
    assert model.weight[0, masked] == 0


def test_compiled_models_and_scalers():
    model = net()
    sw.prune(model, "magnitude", sparsity=0.6)
    record = sw.masks(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    run = sw.sparsify(model, optimizer, "fixed")
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(4, 3, 8, 8)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    run.finish()
    assert record.violations(model) == {}


def test_misuse_is_refused():
    model = net()
    with pytest.raises(ModelError, match="needs a model with masks"):
        sw.sparsify(model, torch.optim.SGD(model.parameters(), 0.1), "fixed")
    sw.prune(model, "magnitude", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="does not hold"):
        sw.sparsify(model, torch.optim.SGD(net().parameters(), 0.1), "fixed")
    with pytest.raises(InvalidArgument, match="is one-shot, not hooked"):
        sw.sparsify(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude")

    class FP16_Optimizer(torch.optim.SGD):
        pass

    with pytest.raises(InvalidArgument, match="flattened"):
        sw.sparsify(model, FP16_Optimizer(model.parameters(), 0.1), "fixed")
