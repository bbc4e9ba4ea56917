"""Sparse models in torch.export, ONNX and safetensors: the same outputs, with their zeros."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.cli import main
from sparseworks.io.onnx import onnx_session


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4),
    ), (torch.randn(2, 3, 12, 12),)  # fmt: skip


def torchvision():
    pytest.importorskip("torchvision")
    return sw.zoo.from_library("torchvision:resnet18", num_classes=4), (torch.randn(1, 3, 64, 64),)


def timm():
    pytest.importorskip("timm")
    return sw.zoo.from_library("timm:test_vit", num_classes=4), (torch.randn(1, 3, 160, 160),)


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    ids = torch.randint(0, 50, (2, 8))
    return transformers.BertModel(config).eval(), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


MODELS = [convolutional, torchvision, timm, bert]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def pruned(request):
    """A model at 70 % zeros, its example, and its outputs."""
    model, example = request.param()
    sw.prune(model.eval(), "magnitude", sparsity=0.7)
    with torch.no_grad():
        told = model(**example) if isinstance(example, dict) else model(*example)
    return model, example, told[0] if not isinstance(told, torch.Tensor) else told


def test_onnxruntime_says_the_same_and_holds_the_zeros(pruned, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx

    model, example, told = pruned
    path = sw.export_onnx(model, example, tmp_path / "model.onnx")
    session = onnx_session(path, threads=1)
    given = example.values() if isinstance(example, dict) else example
    feed = {i.name: value.numpy() for i, value in zip(session.get_inputs(), given)}
    first = session.run(None, feed)[0]
    np.testing.assert_allclose(first, told.numpy(), rtol=1e-3, atol=1e-4)
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    record = sw.masks(model)
    zeros = sum(int((a == 0).sum()) for a in stored if a.ndim > 1)
    assert zeros >= sum(int((~record[n]).sum()) for n in record)


def test_an_exported_program_says_the_same_and_is_read_back(pruned, tmp_path):
    model, example, told = pruned
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    program = torch.export.export(model, args, kwargs, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        said = again(*args, **kwargs)
    said = said if isinstance(said, torch.Tensor) else said[0]
    torch.testing.assert_close(said, told)
    state = again.state_dict()
    assert all(bool((state[n][~mask] == 0).all()) for n, mask in sw.masks(model).items())


def test_other_readers_of_safetensors_see_the_file_and_what_it_says_of_itself(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    model, _ = convolutional()
    sw.prune(model, "magnitude", sparsity=0.7)
    sw.save(model, tmp_path / "packed.safetensors")
    sw.export_dense(model, tmp_path / "dense.safetensors")
    with safetensors.safe_open(tmp_path / "packed.safetensors", "pt") as file:
        said = file.metadata()
        assert said["format"] == "pt"
        own = json.loads(said["sparseworks"])
        assert own["method"] == "magnitude" and own["model"] == "Sequential"
        kept = int(sw.masks(model)["5.weight"].sum())
        assert own["tensors"]["5.weight"]["kept"] == kept
        assert len(file.get_tensor("5.weight::values")) == kept
    with safetensors.safe_open(tmp_path / "dense.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(n), v) for n, v in model.state_dict().items())


def test_the_command_writes_onnx_and_plain_files(tmp_path):
    for package in ("torchvision", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    name, model = "torchvision:resnet18:num_classes=4", torchvision()[0]
    words = ["--input-shape", "3", "32", "32", "--batch", "2"]
    out = tmp_path / "m.onnx"
    assert main(["export", name, "--to", "onnx", "--out", str(out), *words]) == 0
    x = torch.randn(2, 3, 32, 32)
    session = onnx_session(out, threads=1)
    [said] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(said, model(x).numpy(), rtol=1e-3, atol=1e-4)
    plain = tmp_path / "m.safetensors"
    assert main(["export", name, "--out", str(plain)]) == 0
    from safetensors.torch import load_file

    assert all(torch.equal(load_file(plain)[n], v) for n, v in model.state_dict().items())
