"""What every registered method keeps, by being registered: a new one is tried here by itself.

A method that the tiny net has nothing for names its model in `tiny_models.FACTORIES`, and what its
call needs besides in `OPTIONS`.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
import tiny_models
from interrupting import Fault, calls_counted, picture
from sparseworks.core import registry
from sparseworks.core.kinds import base_of
from sparseworks.core.patterns import parse_pattern
from sparseworks.models.calls import default_loss
from sparseworks.training.straight_through import StraightThrough

ROOT = Path(__file__).resolve().parents[1]
BASELINES = {  # classics that no method card describes; those to come have one
    "alpha-pruning", "cats", "fixed", "gradual", "grasp", "group-bn", "group-energy",
    "group-fisher", "group-norm", "group-random", "group-taylor", "magnitude",
    "owl", "random", "rounding", "snip", "synflow", "teal", "upcycling",
}  # fmt: skip
X = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 10
BATCHES = [(X[:6], Y[:6]), (X[6:], Y[6:])]
STEPS = 4
ADAM = {"ast", "cast", "slorb"}  # rules inside Adam
OPTIONS: dict[str, dict[str, Any]] = {
    "components": {"step": 0.45, "least": -0.9},
    "ecodiff": {"sampler": tiny_models.sampler, "epochs": 1, "include": "denoiser.blocks"},
    "ownership": {"owner": "somebody", "size": 4, "sparsity": None},
    "precrop": {"densities": "expected"},
    "gqsa": {"block_epochs": 1, "tune_epochs": 1},
    "random-search": {"candidates": 3},
    "rewinding": {"rounds": 1},
    "sap": {"rounds": 1},
    "soup": {"copies": 2, "phases": 1},
    "sparse-ift": {"example": X[:2]},
    "synflow": {"rounds": 2},
    "turbo-vbi": {"samples": 12},
}
METHODS = pytest.mark.parametrize("name", registry.names())
KIND = {name: registry.resolve(name).info.kind for name in registry.names()}


def model_for(name: str) -> nn.Module:
    model = tiny_models.FACTORIES.get(name, tiny_models.net)()
    if name == "ownership" or getattr(registry.resolve(name), "starts_from_record", False):
        sw.prune(model, "magnitude", sparsity=0.5)
    return model


def obeys(model: nn.Module, masks: Any) -> None:
    """Every weight outside its mask is exactly zero, in the model's own parameters."""
    named = dict(model.named_parameters())
    for name, mask in masks.items():
        assert not named[name].detach()[~mask].any(), f"{name}: a masked weight is not zero"


def loop(model: nn.Module, optimizer: Any, after: Callable[[], None], penalty: Any = None) -> None:
    for step in range(STEPS):
        x, y = BATCHES[step % 2]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()
        after()


def fit(model: nn.Module, *, start: Any, seed: int, first_step: int = 0, **_: Any) -> None:
    """A training function as `sw.experiment` calls it."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    start(model, optimizer, STEPS)
    for step in range(first_step, STEPS):
        x, y = BATCHES[step % 2]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def score(model: nn.Module) -> float:
    return -float(F.cross_entropy(model(X), Y))


def goal(name: str) -> dict[str, float]:
    """A sparsity, where neither a record nor the pattern tells it."""
    cls = registry.resolve(name)
    if getattr(cls, "starts_from_record", False):
        return {}
    pattern = getattr(cls(), "pattern", None)
    fixed = pattern is not None and parse_pattern(pattern).fixed_density is not None
    return {} if fixed else {"sparsity": 0.5}


def optimizer_for(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name in ADAM:
        return torch.optim.AdamW(parameters, lr=0.01)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def call(name: str, model: nn.Module) -> Any:
    """The entry call of a method on a tiny model; what it returns."""
    kind, options = KIND[name], dict(OPTIONS.get(name, {}))
    if kind == "one-shot":
        return sw.prune(model, name, sparsity=0.5, data=BATCHES, **options)
    if kind == "search":
        return sw.prune(model, name, data=BATCHES, **options)
    if kind == "staged":
        return sw.prune(model, name, sparsity=0.5, data=tiny_models.texts(), **options)
    if kind == "whole-model":
        texts = tiny_models.texts()
        return sw.slim(model, texts[0], method=name, params=0.8, data=texts, **options)
    if name == "cfsp":
        texts = tiny_models.texts()
        return sw.slim(model, texts[0], method=name, params=0.8, data=texts, **options)
    if kind == "quantization":
        return sw.quantize(model, name, data=tiny_models.texts(), **options)
    if kind == "activation":
        return sw.sparse_activations(model, name, sparsity=0.5, data=BATCHES, **options)
    if kind == "mixture":
        return sw.upcycle(model, name, steps=STEPS, **options)
    if kind == "hooked":
        return sw.sparsify(
            model, optimizer_for(name, model.parameters()), name, steps=STEPS, **goal(name),
            **options,
        )  # fmt: skip
    if kind == "transform":
        return sw.transform(model, name, **{**goal(name), "steps": STEPS, **options})
    if kind == "driver":
        given = {"sparsity": 0.5, "evaluate": score, "data": BATCHES, **options}
        return sw.experiment(fit, model, name, **given)
    if kind == "optimizer":
        return sw.optimizer(model.parameters(), name, lr=0.01, **options)
    if kind == "structured":
        data: Any = tiny_models.chains() if name == "ecodiff" else BATCHES
        noise, words = tiny_models.chains()[0]
        example: Any = (noise, torch.full((2,), 0.5), words) if name == "ecodiff" else X[:2]
        return sw.slim(model, example, method=name, flops=0.6, data=data, **options)
    if name == "pat":
        texts = tiny_models.texts()
        return sw.slim(model, texts[0], method=name, data=texts, epochs=4, **options)
    if kind == "train-and-cut":
        return sw.slim(model, X[:2], method=name, data=BATCHES, epochs=1, **options)
    assert kind == "measurement"
    if name == "fair-comparison":
        runs = [{"name": n, "method": n, "seed": 0, "score": 0.5} for n in ("dense", "rigl")]
        return sw.audit(runs)
    metric = lambda net: 1.0 + float(net(X).square().mean())  # noqa: E731
    return registry.resolve(name)(**options)(model, metric)


@METHODS
def test_it_is_a_frozen_dataclass_of_its_kind_with_a_default_for_every_option(name: str) -> None:
    cls = registry.resolve(name)
    method = cls()
    info = cls.info
    assert is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert issubclass(cls, base_of(info.kind)) and info.name == name
    assert all((info.title, info.authors, info.room, info.summary, info.pattern, info.budget))
    assert method == cls()


@METHODS
def test_its_options_go_through_a_record_and_back(name: str) -> None:
    own = {f.name for f in fields(registry.resolve(name))}
    given = {k: v for k, v in OPTIONS.get(name, {}).items() if k in own}
    for options in ({}, given):
        method = registry.build(name, **options)
        hidden = {f.name: getattr(method, f.name) for f in fields(method) if not f.repr}
        told = json.loads(json.dumps(registry.options_of(method)))
        plain = {k: v for k, v in told.items() if not isinstance(getattr(method, k), sampler_type)}
        kept = {k: getattr(method, k) for k in told.keys() - plain.keys()}
        again = registry.build(name, **plain, **kept, **hidden)
        assert again == method
        assert json.loads(json.dumps(registry.options_of(again))) == told


sampler_type = type(tiny_models.sampler)


@METHODS
def test_its_docstring_gives_equation_and_source(name: str) -> None:
    cls = registry.resolve(name)
    module = inspect.getmodule(cls)
    assert module is not None
    text = f"{inspect.getdoc(module) or ''}\n{inspect.getdoc(cls) or ''}"
    surname = re.split(r"[ ,;&]", cls.info.authors)[0]
    if surname != "-":
        assert surname in text, f"the docstring does not name {cls.info.authors}"
        assert re.search(r"\b(19|20)\d\d\b", text), "the docstring gives no year"
    assert re.search(r"[=<>|^~]|\bsum\b|argm(in|ax)", text), "the docstring gives no equation"


@METHODS
def test_its_card_has_a_claim_with_results(name: str) -> None:
    card = registry.resolve(name).info.card
    if not card:
        assert name in BASELINES, "a method has the number of its card: MethodInfo(card=...)"
        return
    assert name not in BASELINES
    found = list((ROOT / "claims").glob(f"*/{card}_*.py"))
    assert len(found) == 1, f"claims/<room>/{card}_<name>.py is missing"
    assert found[0].with_suffix(".json").is_file(), f"run it: sparseworks claims run {card}"
    assert "CLAIM" in {
        target.id
        for node in ast.parse(found[0].read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


@METHODS
def test_what_it_masks_is_exactly_zero(name: str) -> None:
    model = model_for(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    parameters = sum(p.numel() for p in model.parameters())
    made = call(name, model)
    kind = KIND[name]
    if kind == "hooked":
        fading = isinstance(registry.build(name), StraightThrough)  # may be soft until the end
        loop(model.train(), made.optimizer, lambda: fading or obeys(model, made.masks))
        made.finish()
    elif kind == "transform":
        optimizer = optimizer_for(name, made.parameter_groups())
        made.attach(optimizer)
        loop(model.train(), optimizer, lambda: None, made.penalty)
        made.finish()
    if kind == "optimizer":
        loop(model.train(), made, lambda: None)
        assert sw.masks(model) is None
        assert any(not torch.equal(t, before[n]) for n, t in model.state_dict().items())
    elif kind in ("structured", "train-and-cut", "whole-model"):
        assert 0 < sum(p.numel() for p in model.parameters()) <= parameters
        assert made.method == name and json.dumps(made.to_dict(), default=str)
        assert kind == "train-and-cut" or made.shapes, "nothing was cut"
    elif kind == "quantization":
        grids = sw.grids(model)
        assert set(grids) == set(grids.held_by(model)) == {t.name for t in made.tensors}
        assert grids.nbytes < 2 * sum(t.total for t in made.tensors)
        obeys(model, sw.masks(model) or {})
        assert not any(m.__class__.__name__.startswith("Parametrized") for m in model.modules())
    elif kind == "activation":
        with torch.no_grad():
            model(X)
        assert 0 < made.density < 1
        made.remove()
        assert picture(model) == picture(model_for(name))
    elif kind == "mixture":
        trained_as_a_mixture(model, made)
    elif kind == "measurement":
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    else:
        record = sw.masks(model)
        assert record is not None and record.violations(model) == {}
        obeys(model, record)
        assert 0 < record.sparsity() < 1
        assert not any(m.__class__.__name__.startswith("Parametrized") for m in model.modules())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def trained_as_a_mixture(model: nn.Module, run: Any) -> None:
    """Some steps by its schedule; its experts are counted, what it freezes it gives back."""
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, 1e-3)
    run.attach(optimizer)
    for batch in tiny_models.texts() * (STEPS // 2):
        optimizer.zero_grad()
        (default_loss(model.train(), batch) + run.penalty()).backward()
        optimizer.step()
    run.finish()
    run.reset()
    with torch.no_grad():
        twice = [default_loss(model.eval(), tiny_models.texts()[0]) for _ in range(2)]
    assert run.step == STEPS and 0 < run.density <= 1
    assert torch.equal(*twice), "evaluation draws random numbers"
    assert all(p.requires_grad for p in model.parameters())


@cache
def length(name: str) -> int:
    model = model_for(name)
    with calls_counted() as seen:
        call(name, model)
    return seen[0]


@METHODS
@pytest.mark.parametrize("place", [0.3, 0.9])
def test_a_call_that_fails_in_the_middle_changes_nothing(name: str, place: float) -> None:
    total = length(name)
    for _ in range(2):
        model = model_for(name)
        before = picture(model)
        try:
            with calls_counted(max(1, int(place * total))) as seen:
                call(name, model)
        except Fault:
            break
        total = seen[0]  # the first call of all makes more, for what is looked up once
    else:
        pytest.fail("the call was not interrupted")
    after = picture(model)
    for what, value in before.items():
        assert after[what] == value, what
