"""The laws of experiments: nothing is computed twice, nothing half done is believed."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError, InvalidArgument, ModelError
from sparseworks.core.masks import Masks
from sparseworks.core.registry import MethodInfo
from sparseworks.training.experiment import Driver

STEPS = 6


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


class Fit:
    """Counts its calls; may die in the middle of one."""

    def __init__(self, die_in=None):
        self.calls, self.die_in = 0, die_in

    def __call__(self, model, *, start, seed, first_step, lr=0.1):
        self.calls += 1
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        start(model, optimizer, STEPS)
        g = torch.Generator().manual_seed(seed)
        model.train()
        for step in range(STEPS):
            x, y = torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)
            if step < first_step:
                continue
            if self.calls == self.die_in and step == first_step + 1:
                raise KeyboardInterrupt
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


@dataclass(frozen=True)
class Chain(Driver):
    """Three trainings, one after the other; the second with masks."""

    lr: float = 0.1
    info: ClassVar[MethodInfo] = MethodInfo(
        name="chain", title="", authors="", year=2020, room="weights", kind="driver"
    )

    def run(self, experiment):
        first = experiment.train("first", stop_at=2)
        model = first.into(experiment.fresh())
        mask = model[0].weight.detach().abs() > 0.2
        second = experiment.train(
            "second", start=first, record=Masks.of({"0.weight": mask}), first_step=2
        )
        return experiment.train("third", start=second, seed=5, lr=self.lr)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_finished_runs_are_skipped_and_give_the_same_model(tmp_path):
    fit, one, two, memory = Fit(), net(), net(), net()
    sw.experiment(fit, one, Chain(), folder=tmp_path, about={})
    assert fit.calls == 3
    again = sw.experiment(fit, two, Chain(), folder=tmp_path, about={})
    assert fit.calls == 3 and same(one, two)
    assert torch.equal(sw.masks(one)["0.weight"], sw.masks(two)["0.weight"])
    sw.experiment(fit, memory, Chain())
    assert fit.calls == 6 and same(one, memory)
    assert list(again.finished) == ["first", "second", "third"] and again.result.name == "third"
    assert "third" in str(again)


def test_what_is_interrupted_goes_on_bit_for_bit(tmp_path):
    whole = net()
    sw.experiment(Fit(), whole, Chain())
    for die_in in (1, 2, 3):
        model, before, folder = net(), net(), tmp_path / str(die_in)
        with pytest.raises(KeyboardInterrupt):
            sw.experiment(Fit(die_in), model, Chain(), folder=folder, about={})
        assert same(model, before) and sw.masks(model) is None
        rest = Fit()
        sw.experiment(rest, model, Chain(), folder=folder, about={})
        assert rest.calls == 3 - (die_in - 1) and same(model, whole)


def test_masked_weights_stay_zero_and_the_global_generator_is_left_alone():
    model = net()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    sw.experiment(Fit(), model, Chain())
    assert torch.equal(torch.rand(3), expected)
    record = sw.masks(model)
    assert record.violations(model) == {} and 0 < record.sparsity() < 1


@pytest.mark.parametrize("change", ["about", "seed", "options", "model"])
def test_another_description_is_another_run(tmp_path, change):
    fit, model = Fit(), net()
    sw.experiment(fit, net(), Chain(), folder=tmp_path, about={"epochs": 1})
    about = {"epochs": 2 if change == "about" else 1}
    if change == "model":
        with torch.no_grad():
            model[4].bias += 1
    method = Chain(lr=0.2) if change == "options" else Chain()
    seed = 1 if change == "seed" else 0
    sw.experiment(fit, model, method, folder=tmp_path, about=about, seed=seed)
    assert fit.calls == (4 if change == "options" else 6)  # the first two runs have no such option


def test_the_first_steps_are_those_of_the_whole_training():
    @dataclass(frozen=True)
    class Split(Chain):
        def run(self, experiment):
            whole = experiment.train("whole")
            for k in (1, 3):
                part = experiment.train(f"first {k}", stop_at=k).into(experiment.fresh())
                by_hand = experiment.fresh()
                torch.manual_seed(0)  # dropout
                plain(by_hand, k)
                assert same(part, by_hand)
            return whole

    def plain(model, count):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        g = torch.Generator().manual_seed(0)
        model.train()
        for _ in range(count):
            x, y = torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    model, by_hand = net(), net()
    sw.experiment(Fit(), model, Split())
    torch.manual_seed(0)
    plain(by_hand, STEPS)
    assert same(model, by_hand)


def test_scores_are_kept_and_added_where_they_are_missing(tmp_path):
    fit, seen = Fit(), []

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(1)
        return float(model[0].weight.sum())

    sw.experiment(fit, net(), Chain(), folder=tmp_path, about={})
    for _ in range(2):
        done = sw.experiment(fit, net(), Chain(), folder=tmp_path, about={}, evaluate=evaluate)
    assert fit.calls == 3 and len(seen) == 3
    model = done.finished["second"].into(net())
    assert done.finished["second"].figures["score"] == pytest.approx(
        float(model[0].weight.detach().sum())
    )


def test_the_folder_says_what_every_run_was(tmp_path):
    done = sw.experiment(Fit(), net(), Chain(), folder=tmp_path, about={"data": "random"})
    (summary,) = tmp_path.glob("chain-*.json")
    said = json.loads(summary.read_text())
    assert list(said["runs"]) == ["first", "second", "third"]
    for name, run in done.finished.items():
        kept = json.loads((tmp_path / run.digest / "run.json").read_text())
        assert kept["name"] == name and kept["description"]["about"] == {"data": "random"}
    assert kept["description"]["start"] == done.finished["second"].digest
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_edited_run_is_refused(tmp_path):
    done = sw.experiment(Fit(), net(), Chain(), folder=tmp_path, about={})
    path = tmp_path / done.finished["second"].digest / "run.json"
    path.write_text(
        path.read_text().replace('"first_step": 2,\n  "stop', '"first_step": 1,\n  "stop')
    )
    with pytest.raises(CheckpointError, match="remove the folder"):
        sw.experiment(Fit(), net(), Chain(), folder=tmp_path, about={})


def test_bad_calls_are_refused_before_any_training(tmp_path):
    fit = Fit()
    with pytest.raises(InvalidArgument, match="about"):
        sw.experiment(fit, net(), Chain(), folder=tmp_path)
    with pytest.raises(InvalidArgument, match="JSON"):
        sw.experiment(fit, net(), Chain(), about={"x": object()})
    with pytest.raises(InvalidArgument, match="not driver"):
        sw.experiment(fit, net(), "magnitude", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="matches no weight"):
        sw.experiment(fit, net(), Chain(), include="nothing.*")
    assert fit.calls == 0
    with pytest.raises(ModelError, match="never called"):
        sw.experiment(lambda model, **_: None, net(), Chain())


def test_a_training_that_swallows_its_end_is_noticed():
    def fit(model, *, start, seed, first_step):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        start(model, optimizer, STEPS)
        for _ in range(STEPS):
            try:
                optimizer.step()
            except BaseException:
                copy.copy(model)

    with pytest.raises(InvalidArgument, match="step 2"):
        sw.experiment(fit, net(), Chain())


def test_a_run_that_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
    from sparseworks.io import saving

    fit, whole = Fit(), net()
    sw.experiment(Fit(), whole, Chain())
    real, seen = saving.save, []

    def broken(model, path, **options):
        seen.append(path)
        if len(seen) == 2:
            path.write_bytes(b"half")
            raise OSError("no space left")
        return real(model, path, **options)

    monkeypatch.setattr(saving, "save", broken)
    with pytest.raises(CheckpointError, match="no space"):
        sw.experiment(fit, net(), Chain(), folder=tmp_path, about={})
    assert len(list(tmp_path.iterdir())) == 1
    model = net()
    sw.experiment(fit, model, Chain(), folder=tmp_path, about={})
    assert fit.calls == 4 and same(model, whole)


def test_what_was_left_long_ago_is_swept_away(tmp_path):
    """By processes of which nothing is known; `io.temporary` tells the others."""
    old, young = tmp_path / f".a.{'1' * 12}.tmp", tmp_path / f".b.{'2' * 12}.tmp"
    for place in (old, young):
        place.mkdir()
        (place / "weights.safetensors").write_bytes(b"half")
    os.utime(old / "weights.safetensors", (0, 0))
    os.utime(old, (0, 0))
    sw.experiment(Fit(), net(), Chain(), folder=tmp_path, about={})
    assert not old.exists() and young.exists()


def test_two_processes_may_finish_the_same_run(tmp_path, monkeypatch):
    other = tmp_path / "other"
    sw.experiment(Fit(), net(), Chain(), folder=other, about={})
    mine, real = tmp_path / "mine", os.rename

    def late(source, target):  # the other process renames just before this one
        if not os.path.exists(target):
            shutil.copytree(other / os.path.basename(target), target)
        real(source, target)

    monkeypatch.setattr(os, "rename", late)
    fit, model = Fit(), net()
    sw.experiment(fit, model, Chain(), folder=mine, about={})
    assert fit.calls == 3 and len(list(mine.glob("*/run.json"))) == 3
    assert not list(mine.glob(".*"))
