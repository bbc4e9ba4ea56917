"""Pruning from disk gives what pruning in memory gives, bit for bit, however often it is killed."""

from __future__ import annotations

import json

import pytest
import torch

import sparseworks as sw
from sparseworks.core.errors import CheckpointError, InvalidArgument, ModelError
from sparseworks.weights.oneshot.staging import Staging
from test_decoder_families import _OWN, _TEXT, FAMILIES, SIZES

transformers = pytest.importorskip("transformers")


def make_folder(family, path, dtype=torch.float32):
    torch.manual_seed(0)
    config_class = getattr(transformers, _TEXT.get(family, f"{family}Config"))
    sizes = {} if family == "GPT2" else SIZES
    config = config_class(**{**sizes, "vocab_size": 64, **FAMILIES[family]})
    model = getattr(transformers, _OWN.get(family, f"{family}ForCausalLM"))(config)
    model.to(dtype).eval().save_pretrained(path, max_shard_size="20KB")
    return path


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 64, (2, 12), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    made[1]["attention_mask"][0, :4] = 0
    return made


def tensors(folder):
    with sw.io.opening.open_checkpoint(folder) as checkpoint:
        return {n: checkpoint.read(n) for n in checkpoint.tensors}


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))
        for n in a
    )


def in_memory(source, path, method, **options):
    model = sw.from_pretrained(source)
    result = sw.prune(model, method, **options)
    sw.export_dense(model, path)
    return result


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_as_in_memory(family, method, tmp_path):
    source = make_folder(family, tmp_path / "source")
    options = {"sparsity": 0.5, "data": None if method == "magnitude" else batches()}
    expected = in_memory(source, tmp_path / "memory", method, **options)
    result = sw.prune_folder(source, tmp_path / "disk", method, shard_size="30KB", **options)
    assert equal(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    assert dict(result.skipped) == dict(expected.skipped)
    assert [t.name for t in result.tensors] == [t.name for t in expected.tensors]
    assert [t.error for t in result.tensors] == [t.error for t in expected.tensors]
    assert result.warnings == expected.warnings
    for name in expected.masks:
        assert torch.equal(result.masks[name], expected.masks[name])
    assert not (tmp_path / "disk.part").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    again.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
