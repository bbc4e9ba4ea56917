"""Folders of integers: what is stored is what was rounded, and compressed-tensors reads it so."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file

import sparseworks as sw
import tiny_models
from sparseworks.core.errors import CheckpointError, InvalidArgument, ModelError
from sparseworks.io.quantized import RATIOS, pack, quantize

transformers = pytest.importorskip("transformers")


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    options = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options | changes)).eval()
    sw.prune(model, "magnitude", sparsity=0.5)
    for parameter in model.parameters():  # as transformers does: rotary frequencies stay fp32
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def unpacked(packed, bits, columns):
    """By Python's own integers: a row of words is one number, the first integer in its low bits."""
    rows = []
    for row in packed.tolist():
        number = sum((word % (1 << 32)) << (32 * i) for i, word in enumerate(row))
        half, all_ = 1 << (bits - 1), (1 << bits) - 1
        rows.append([((number >> (bits * i)) & all_) - half for i in range(columns)])
    return torch.tensor(rows)


def dequantized(model, folder, group):
    """A copy with the weights that the folder's integers and scales stand for, `s q`."""
    stored = load_file(folder / "model.safetensors")
    twin = copy.deepcopy(model)
    found = []
    for name, module in twin.named_modules():
        scale = stored.get(f"{name}.weight_scale")
        if scale is None:
            continue
        rows, columns = module.weight.shape
        if f"{name}.weight_packed" in stored:
            assert stored[f"{name}.weight_shape"].tolist() == [rows, columns]
            packed = stored[f"{name}.weight_packed"]
            codes = unpacked(packed, 32 * packed.shape[1] // columns, columns)
        else:
            codes = stored[f"{name}.weight"]
            assert codes.dtype == torch.int8
        wide = scale.repeat_interleave(group or columns, 1)
        module.weight.data = codes.to(scale.dtype) * wide
        found.append(f"{name}.weight")
    return twin, found


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_come_back(bits):
    draw = random.Random(bits)
    for columns in (1, 7, 8, 33, 64):
        low = -(1 << (bits - 1))
        codes = torch.tensor([[draw.randint(low, -low - 1) for _ in range(columns)]
                              for _ in range(3)], dtype=torch.int8)  # fmt: skip
        packed = pack(codes, bits)
        assert packed.dtype == torch.int32 and packed.shape[1] == -(-columns * bits // 32)
        assert torch.equal(unpacked(packed, bits, columns), codes.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits,group", [(4, 16), (4, 0), (8, 32), (8, 0)])
def test_rounding_is_the_best_of_its_scales(dtype, bits, group):
    torch.manual_seed(bits)
    weight = (torch.randn(5, 64) * torch.logspace(-6, 1, 5)[:, None]).to(dtype)
    weight *= torch.rand(5, 64) < 0.5
    weight[1, :32] = 0
    codes, scales = quantize(weight, bits, group)
    width, top = group or 64, 2 ** (bits - 1) - 1
    assert codes.abs().max() <= top and scales.dtype == dtype
    assert bool((codes[weight == 0] == 0).all())  # a zero stays a zero
    for row in range(5):
        for g in range(64 // width):
            part = weight[row, g * width : (g + 1) * width].double()
            made = codes[row, g * width : (g + 1) * width].double() * scales[row, g].double()
            errors = []
            for ratio in RATIOS:
                scale = part.abs().max().float() * (ratio / top)
                scale = scale.clamp_min(torch.finfo(dtype).tiny).to(dtype).double()
                there = (part / scale).round().clamp(-top, top) * scale
                errors.append(float((there - part).square().sum()))
            assert float((made - part).square().sum()) <= min(errors) * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme,bits,group", [
    ("pack-quantized", 4, 32), ("pack-quantized", 4, 0), ("pack-quantized", 8, 16),
    ("int-quantized", 8, 0),
])  # fmt: skip
def test_transformers_computes_with_the_dequantized_weights(tmp_path, dtype, scheme, bits, group):
    pytest.importorskip("compressed_tensors")
    model = llama(dtype)
    before = {n: p.clone() for n, p in model.named_parameters()}
    made = sw.export_quantized(model, tmp_path / "out", scheme, bits=bits, group=group)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    twin, found = dequantized(model, made.path, group)
    assert sorted(found) == sorted(made.tensors) and len(found) == 2 * 7
    for name, entry in sw.masks(model).items():
        assert bool((twin.get_parameter(name)[~entry] == 0).all())
    read = transformers.AutoModelForCausalLM.from_pretrained(made.path)
    ids = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, dense = twin(ids).logits, model(ids).logits
        assert torch.equal(read(ids).logits, wanted)
    assert 0 < float((wanted - dense).norm() / dense.norm()) < (0.3 if bits == 4 else 0.03)


def test_what_is_not_rounded_is_named(tmp_path):
    made = sw.export_quantized(llama(), tmp_path / "out", group=64)
    assert made.skipped["model.layers.0.mlp.down_proj.weight"] == "96 columns do not divide by 64"
    assert "lm_head.weight" in made.skipped and len(made.tensors) == 2 * 6
    config = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == [
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"
    ]  # fmt: skip
    assert made.bytes == (made.path / "model.safetensors").stat().st_size
    sw.export_dense(llama(), tmp_path / "dense")
    assert made.bytes < (tmp_path / "dense" / "model.safetensors").stat().st_size / 2


def test_misuse_is_refused_before_anything_is_written(tmp_path):
    path, model = tmp_path / "out", llama()
    for options, message in (
        ({"scheme": "marlin-24"}, "pack-quantized, int-quantized"), ({"bits": 3}, "4 or 8"),
        ({"scheme": "int-quantized", "bits": 4}, "has 8"), ({"group": -1}, "group=-1"),
        ({"scheme": "int-quantized", "group": 32}, "a scale a row"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=message):
            sw.export_quantized(model, path, **options)
    with pytest.raises(ModelError, match="no weight to round"):
        sw.export_quantized(model, path, group=1000)
    with pytest.raises(InvalidArgument, match="transformers"):
        sw.export_quantized(torch.nn.Linear(128, 128), path)
    experts = tiny_models.mixture()
    with pytest.raises(ModelError, match="a bank of experts"):
        sw.export_quantized(experts, path, group=16)
    broken = llama()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        sw.export_quantized(broken, path, group=32)
    assert not list(tmp_path.iterdir())
    sw.export_quantized(model, path, group=32)
    with pytest.raises(CheckpointError, match="quantized"):
        sw.from_pretrained(path)
