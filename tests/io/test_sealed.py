"""Whatever we write beside the checkpoints has a checksum: no changed byte of it goes unseen."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError
from sparseworks.io.sealed import SEAL, check_seal, seal_of
from sparseworks.training.checkpointing import load_state, save_state

TREE = {"step": 7, "weight": torch.arange(6.0).view(2, 3), "flags": torch.tensor([True, False])}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def written(kind, folder):
    """(file, how it is read, whether what was read is what was written)."""
    path = folder / "file.safetensors"
    if kind == "state":
        save_state(path, TREE)

        def same(found):
            return found["step"] == 7 and all(
                torch.equal(found[n], TREE[n]) for n in ("weight", "flags")
            )

        return path, lambda: load_state(path), same
    model = net()
    sw.prune(model, "magnitude", sparsity=0.5)
    record = sw.masks(model)
    sw.save_masks(model, path)

    def same(found):
        return found.method == "magnitude" and all(
            torch.equal(found[n], record[n]) and found.entry(n).pattern == "unstructured"
            for n in record
        )

    return path, lambda: sw.load_masks(path, net()), same


@pytest.mark.parametrize("kind", ["state", "masks"])
def test_every_changed_byte_is_found_or_changes_nothing(kind, tmp_path):
    path, read, same = written(kind, tmp_path)
    good = path.read_bytes()
    refused = 0
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(good):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << position % 8]), position)
            try:
                assert same(read()), position
            except CheckpointError:
                refused += 1
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert same(read()) and refused > 0.9 * len(good)


def test_the_checksum_is_of_names_dtypes_shapes_bytes_and_metadata():
    tensors = {"a": torch.arange(6, dtype=torch.int32), "b": torch.zeros(0)}
    good = seal_of(tensors, {"x": "1"})
    others = [
        ({"c": tensors["a"], "b": tensors["b"]}, {"x": "1"}),
        ({**tensors, "a": tensors["a"].view(torch.float32)}, {"x": "1"}),
        ({**tensors, "a": tensors["a"].view(2, 3)}, {"x": "1"}),
        ({**tensors, "a": tensors["a"].flip(0)}, {"x": "1"}),
        (tensors, {"x": "2"}),
    ]
    assert len({good, *(seal_of(*other) for other in others)}) == 6
    assert seal_of(dict(reversed(tensors.items())), {"x": "1", SEAL: "z"}) == good
    check_seal("here", tensors, {"x": "1", SEAL: good})
    check_seal("here", tensors, {"x": "1"})  # of an earlier version
    with pytest.raises(CheckpointError, match="here: damaged"):
        check_seal("here", tensors, {"x": "2", SEAL: good})


def test_a_config_that_is_not_as_it_was_saved_is_told(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=1))
    sw.save(model, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held))  # indented otherwise: the same
    assert sw.from_pretrained(tmp_path / "m").config.rms_norm_eps == held["rms_norm_eps"]
    file.write_text(json.dumps({**held, "rms_norm_eps": 0.1}))
    with pytest.warns(UserWarning, match="not as it was saved"):
        assert sw.from_pretrained(tmp_path / "m").config.rms_norm_eps == 0.1
    file.write_text(json.dumps({**held, "hidden_act": "silv"}))
    with (
        pytest.warns(UserWarning, match="not as it was saved"),
        pytest.raises(CheckpointError, match=r"config\.json: no LlamaForCausalLM can be built"),
    ):
        sw.from_pretrained(tmp_path / "m")
