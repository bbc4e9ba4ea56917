"""Models of timm and torchvision by name: built, pruned, saved, and read back by the same name."""

from __future__ import annotations

import json

import pytest
import torch

import sparseworks as sw
from sparseworks.cli import main
from sparseworks.cli.examples import random_example
from sparseworks.cli.loading import load_model
from sparseworks.core.errors import InvalidArgument, MissingDependency

NAMES = {
    "timm": "timm:test_resnet:num_classes=10",
    "torchvision": "torchvision:resnet18:num_classes=10",
}
SHAPES = {"timm": (2, 3, 160, 160), "torchvision": (2, 3, 224, 224)}


@pytest.fixture(params=sorted(NAMES))
def library(request):
    pytest.importorskip(request.param)
    return request.param


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_name_alone_makes_the_model_and_an_example_and_says_that_it_is_random(library, capsys):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    loaded = load_model(NAMES[library])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not loaded.model.training and loaded.kind == "classifier"
    assert "its weights are random" in capsys.readouterr().err
    example = random_example(loaded, 2)
    assert tuple(example.shape) == SHAPES[library]
    with torch.no_grad():
        assert loaded.model(example[:, :, :64, :64]).shape == (2, 10)
    assert same(loaded.model, load_model(NAMES[library]).model)
    assert not same(loaded.model, load_model(NAMES[library], seed=1).model)
    name = NAMES[library].rpartition(":")[0]
    assert same(loaded.model, sw.zoo.from_library(name, num_classes=10))


def test_pruned_on_the_command_line_and_read_back_by_name(library, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prune", NAMES[library], "--method", "magnitude", "--sparsity", "0.5",
                 "--out", str(out)]) == 0  # fmt: skip
    result = json.loads((out / "result.json").read_text())["result"]
    assert result["sparsity"] == pytest.approx(0.5, abs=1e-3)
    capsys.readouterr()
    again = load_model(f"{NAMES[library]},weights={out}/model.safetensors")
    assert "random" not in capsys.readouterr().err
    assert sw.masks(again.model).sparsity() == pytest.approx(0.5, abs=1e-3)
    wanted = load_model(NAMES[library]).model
    sw.prune(wanted, "magnitude", sparsity=0.5)
    assert same(wanted, again.model)


def test_what_cannot_be_is_refused_by_name(library, tmp_path, monkeypatch):
    near = {"timm": "timm:test_resnett", "torchvision": "torchvision:resnet19"}[library]
    with pytest.raises(InvalidArgument, match=r"has no model .*; did you mean .*resnet"):
        load_model(near)
    with pytest.raises(InvalidArgument, match="pretrained=True: pretrained weights need a network"):
        load_model(f"{NAMES[library]},pretrained=true")
    with pytest.raises(InvalidArgument, match="unexpected keyword argument 'classes_'"):
        load_model(f"{NAMES[library]},classes_=3")
    with pytest.raises(InvalidArgument, match="use timm:NAME or torchvision:NAME"):
        sw.zoo.from_library(library)
    with pytest.raises(ValueError, match=r"w\.pth"):
        load_model(f"{NAMES[library]},weights={tmp_path}/w.pth")
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(MissingDependency, match=f"pip install {library}"):
        load_model(NAMES[library])


def test_no_backbone_is_fetched():
    """A detector of torchvision takes pretrained weights for its backbone unless told not to."""
    pytest.importorskip("torchvision")
    model = sw.zoo.from_library("torchvision:ssdlite320_mobilenet_v3_large", num_classes=3)
    assert len(sw.find_prunable(model).views) > 50
