"""compressed-tensors folders, written here by hand with numpy, read as what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError
from sparseworks.io import inspect

transformers = pytest.importorskip("transformers")


def llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=36,  # rows that do not end on a whole byte
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        intermediate_size=44,
        vocab_size=64,
        dtype=str(dtype).removeprefix("torch."),
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def pack(weight: Tensor, format: str) -> dict[str, Tensor]:
    """One weight as the format stores it, by its written description."""
    raw = weight.float().numpy()
    mask = raw != 0
    values = weight[torch.from_numpy(mask)]
    parts = {
        "compressed": values,
        "bitmask": torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little")),
        "shape": torch.tensor(weight.shape),
    }
    if format == "sparse-24-bitmask":
        parts["compressed"] = values.view(weight.shape[0], weight.shape[1] // 2)
        parts["shape"] = parts["shape"].reshape(-1, 1)
    else:
        starts = np.concatenate([[0], np.cumsum(mask.sum(-1))[:-1]])
        parts["row_offsets"] = torch.from_numpy(starts.astype(np.int64))
    return parts


def write(
    model: Any,
    folder: Path,
    format: str = "sparse-bitmask",
    *,
    key: str = "quantization_config",
    old_names: bool = False,
) -> set[str]:
    """Sparsify a model's linear layers and write the folder; returns the packed names."""
    packed = set()
    state = {}
    for name, weight in model.state_dict().items():
        if "_proj" not in name:
            state[name] = weight
            continue
        if format == "sparse-24-bitmask":
            weight.view(-1, 4)[:, torch.randperm(4)[:2]] = 0
        else:
            weight[torch.rand(weight.shape) < 0.7] = 0
        packed.add(name)
        prefix = name if old_names else name.removesuffix(".weight")
        for part, tensor in pack(weight, format).items():
            state[f"{prefix}.{part}"] = tensor
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    sparsity = {"format": format, "global_sparsity": 0.7, "sparsity_structure": "unstructured"}
    if key == "sparsity_config":
        config[key] = sparsity
    else:
        config[key] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    (folder / "config.json").write_text(json.dumps(config))
    return packed


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(torch.arange(12).view(2, 6)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["sparse-bitmask", "sparse-24-bitmask"])
def test_the_folder_is_read(format, dtype, tmp_path):
    model = llama(dtype)
    packed = write(model, tmp_path / "ct", format)
    back = sw.from_pretrained(tmp_path / "ct")
    assert torch.equal(logits(back), logits(model)) and sw.masks(back) is None
    other = sw.load(tmp_path / "ct", llama(dtype, seed=1), infer_masks=True)
    assert torch.equal(logits(other), logits(model))
    record = sw.masks(other)
    assert set(record) == packed
    for name in packed:
        assert torch.equal(record[name], model.state_dict()[name] != 0)
    expected = "2:4" if format == "sparse-24-bitmask" else "unstructured"
    assert {record.entry(n).pattern for n in packed} == {expected}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "sparsity_config"])
@pytest.mark.parametrize("old_names", [True, False])
def test_older_spellings_are_read(key, old_names, tmp_path):
    model = llama()
    write(model, tmp_path / "ct", key=key, old_names=old_names)
    assert torch.equal(logits(sw.from_pretrained(tmp_path / "ct")), logits(model))
    assert torch.equal(logits(sw.load(tmp_path / "ct", llama(seed=1))), logits(model))


def test_it_can_be_saved_again_as_ours(tmp_path):
    model = llama()
    write(model, tmp_path / "ct")
    sw.save(sw.from_pretrained(tmp_path / "ct", infer_masks=True), tmp_path / "ours")
    back = sw.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(back), logits(model)) and len(sw.masks(back)) == 14


def test_the_header_tells_the_sparsity(tmp_path):
    model = llama()
    packed = write(model, tmp_path / "ct")
    info = inspect(tmp_path / "ct")
    assert info.kind == "compressed-tensors"
    for tensor in info.tensors:
        if tensor.name in packed:
            zeros = float((model.state_dict()[tensor.name] == 0).float().mean())
            assert tensor.layout == "bitmask" and tensor.sparsity == pytest.approx(zeros, abs=1e-6)


NAME = "model.layers.1.mlp.up_proj"


def drop(part: str) -> Any:
    return lambda t: t.pop(f"{NAME}.{part}")


def edit(part: str, change: Any) -> Any:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"]).contiguous()

    return apply


def flip(tensor: Tensor) -> Tensor:
    tensor.view(-1)[0] ^= 1
    return tensor


def past_the_columns(tensor: Tensor) -> Tensor:
    tensor[0, -1] |= 0x80
    return tensor


@pytest.mark.parametrize(
    "damage",
    [
        drop("shape"),
        drop("row_offsets"),
        drop("bitmask"),
        drop("compressed"),
        edit("compressed", lambda t: t[:-1]),
        edit("compressed", lambda t: torch.ones(10_000)),
        edit("bitmask", lambda t: t[:-1]),
        edit("bitmask", flip),
        edit("bitmask", past_the_columns),
        edit("bitmask", lambda t: t.float()),
        edit("shape", lambda t: t.flip(0)),
        edit("shape", lambda t: -t),
        edit("shape", lambda t: t.float()),
        edit("shape", lambda t: torch.ones(100, dtype=torch.int64)),
        edit("row_offsets", lambda t: t + 1),
    ],
)
def test_damage_names_the_tensor(damage, tmp_path):
    write(llama(), tmp_path / "ct")
    file = tmp_path / "ct" / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    model = llama(seed=1)
    before = logits(model)
    for call in (lambda p: sw.load(p, model), sw.from_pretrained):
        with pytest.raises(CheckpointError, match=NAME.replace(".", r"\.")):
            call(tmp_path / "ct")
    assert torch.equal(logits(model), before)


def test_quantized_and_unknown_formats_are_refused(tmp_path):
    write(llama(), tmp_path / "ct")
    config = tmp_path / "ct" / "config.json"
    written = json.loads(config.read_text())
    for wrong, word in (
        (
            {**written, "sparsity_config": {"format": "marlin-24"}, "quantization_config": None},
            "marlin",
        ),
        (
            {**written, "quantization_config": {"quant_method": "gptq"}},
            "gptq|not in the model|bitmask",
        ),
    ):
        config.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=word):
            sw.from_pretrained(tmp_path / "ct")
    written["quantization_config"]["config_groups"] = {"group_0": {}}
    config.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="quantized"):
        sw.from_pretrained(tmp_path / "ct")


def test_convolutions_and_fp8_are_read(tmp_path):
    """The bits run along the last axis whatever the number of axes."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.Linear(10, 6, bias=False))
    model[1].weight = nn.Parameter(
        model[1].weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    state: dict[str, Tensor] = {}
    for i in (0, 1):
        weight = model[i].weight.detach().float()
        weight[torch.rand(weight.shape) < 0.5] = 0
        model[i].weight.data.copy_(weight)
        mask = (weight != 0).numpy()
        kept = model[i].weight.detach().view(torch.uint8 if i else torch.float32)
        state[f"{i}.compressed"] = kept[torch.from_numpy(mask)].view(model[i].weight.dtype)
        state[f"{i}.bitmask"] = torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little"))
        state[f"{i}.shape"] = torch.tensor(weight.shape)
        counts = torch.from_numpy(mask.sum(-1))
        state[f"{i}.row_offsets"] = torch.cumsum(counts, 0) - counts
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"sparsity_config": {"format": "sparse-bitmask"}}')
    other = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.Linear(10, 6, bias=False))
    other[1].weight = nn.Parameter(torch.zeros(6, 10).to(torch.float8_e4m3fn), requires_grad=False)
    sw.load(tmp_path, other)
    for i in (0, 1):
        assert torch.equal(other[i].weight.float(), model[i].weight.float())
