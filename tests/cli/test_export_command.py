"""`sparseworks export`: what it writes is what the functions write."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import sparseworks as sw
import tiny_models
from sparseworks.cli import main

pytest.importorskip("transformers")
MODEL = f"{tiny_models.__file__}:language_model"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A packed folder in bf16, half of it zeros."""
    model = tiny_models.language_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    sw.prune(model, "magnitude", sparsity=0.5)
    path = tmp_path_factory.mktemp("export") / "pruned"
    sw.save(model, path)
    return path


@pytest.mark.parametrize("kind,options", [
    ("pack-quantized", {"bits": 8, "group": 16}), ("int-quantized", {}), ("dense", {}),
])  # fmt: skip
def test_folders_are_those_of_the_functions(pruned, tmp_path, capsys, kind, options):
    words = [w for k, v in options.items() for w in (f"--{k}", str(v))]
    out = tmp_path / "out"
    assert main(["export", str(pruned), "--to", kind, *words, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    model = sw.from_pretrained(pruned)
    if kind == "dense":
        sw.export_dense(model, tmp_path / "wanted")
    else:
        made = sw.export_quantized(model, tmp_path / "wanted", kind, **options)
        assert told["tensors"] == list(made.tensors) and told["bytes"] == made.bytes
    found, wanted = (load_file(p / "model.safetensors") for p in (out, tmp_path / "wanted"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert wanted["model.norm.weight"].dtype == torch.bfloat16
    config = json.loads((out / "config.json").read_text())
    assert ("quantization_config" in config) == (kind != "dense")


def test_gguf(pruned, tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "m.gguf"
    assert main(["export", str(pruned), "--to", "gguf", "--type", "BF16", "--out", str(out)]) == 0
    assert "m.gguf" in capsys.readouterr().out
    assert len(gguf.GGUFReader(out).tensors) == 3 + 2 * 9


def test_what_is_left_is_said(tmp_path, capsys):
    out = ["--to", "pack-quantized", "--group", "32", "--out", str(tmp_path / "out")]
    assert main(["export", MODEL, *out]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "down_proj.weight: not rounded, 48 columns do not divide by 32" in said


@pytest.mark.parametrize("words,message", [
    ([], "for example: sparseworks export"),
    ([MODEL], "for example: sparseworks export"),
    ([MODEL, "--bits", "4", "--out", "OUT"], "--bits and --group are of integers"),
    ([MODEL, "--to", "int-quantized", "--bits", "4", "--out", "OUT"], "bits=4"),
    ([MODEL, "--type", "Q8_0", "--out", "OUT"], "--type and --head are of gguf"),
    ([MODEL, "--weights", "none.safetensors", "--out", "OUT"], "none.safetensors"),
    ([f"{tiny_models.__file__}:net", "--out", "OUT"], "a folder is for transformers models"),
])  # fmt: skip
def test_misuse_is_said_in_one_line(tmp_path, capsys, words, message):
    out = tmp_path / "out"
    assert main(["export", *(str(out) if w == "OUT" else w for w in words)]) == 1
    assert message in capsys.readouterr().err and not out.exists()


def test_nothing_is_replaced(pruned, capsys):
    assert main(["export", str(pruned), "--out", str(pruned)]) == 1
    assert "already exists" in capsys.readouterr().err
