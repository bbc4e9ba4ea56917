"""The harness of `make families`: it tells ok, refused and failed apart, and its laws can fail."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from result_pages import families_page

import every_family as harness
import family_steps
import sparseworks as sw
from model_families import FAMILIES, Family
from sparseworks.core.errors import ModelError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).relu())


def inputs(batch, seed):
    return {"x": torch.randn(batch, 8, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture
def steps(tmp_path):
    return family_steps.Steps("timm net", Family("timm", Net, inputs), tmp_path)


def test_there_are_families_of_all_kinds():
    assert len(FAMILIES) >= 40 and len({f.kind for f in FAMILIES.values()}) >= 6


def test_what_a_step_comes_to_is_told_apart():
    def refused():
        raise ModelError("no")

    def died():
        raise KeyError("x")

    assert harness.tried(lambda: {"n": 1})["status"] == "ok"
    assert harness.tried(lambda: {"status": "does not apply"})["status"] == "does not apply"
    assert harness.tried(refused)["message"] == "no"
    assert harness.tried(died)["status"] == "failed"
    assert harness.tried(lambda: family_steps.require(False, "a law"))["message"] == "Broken: a law"


def test_a_sound_model_passes_every_step(steps):
    for step in ("magnitude", "wanda", "file", "folder", "slim"):
        found = harness.tried(getattr(steps, step))
        assert found["status"] in ("ok", "does not apply"), (step, found)
    assert found["operations"] < 0.75


def test_a_kept_weight_that_changes_is_found(steps, monkeypatch):
    prune = sw.prune

    def broken(*given, **options):
        done = prune(*given, **options)
        with torch.no_grad():
            done.model.one.weight[sw.masks(done.model)["one.weight"]] += 1e-6
        return done

    monkeypatch.setattr(sw, "prune", broken)
    assert "a kept weight changed" in harness.tried(steps.magnitude)["message"]


def test_a_bit_that_does_not_come_back_is_found(steps, monkeypatch):
    load = sw.load

    def broken(*given, **options):
        model = load(*given, **options)
        with torch.no_grad():
            model.head.bias[0] *= -1
        return model

    steps.wanda()
    monkeypatch.setattr(sw, "load", broken)
    assert "the state: other bits" in harness.tried(steps.file)["message"]


def test_a_process_that_does_not_end_is_a_failure_of_its_family():
    found = harness.in_a_process(next(iter(FAMILIES)), seconds=0.01)
    assert {found[s]["status"] for s in harness.STEPS} == {"failed"}
    assert harness.summary([found])["slim"] == {"failed": 1}


def test_the_page_shows_every_family_and_message():
    ok = {"status": "ok"}
    row = {"family": "A", "kind": "encoders", "parameters": 1, "magnitude": ok, "wanda": ok,
           "file": ok, "folder": {"status": "does not apply"},
           "slim": {"status": "refused", "message": "x | <y>\nz"},
           "compile": {**ok, "kind": "torch", "no program": "no program: why"}}  # fmt: skip
    page = families_page({"families": 1, "rows": [row], "summary": harness.summary([row]),
                          "machine": {"transformers": "1", "timm": "2"}})  # fmt: skip
    assert "| A | ok | ok | ok | - | refused | torch |" in page
    assert "- A, slim: refused: x / ‹y› z" in page and "no program: why" in page
