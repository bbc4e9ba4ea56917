"""A trained model: what a decoder says under every format is what its packed weights say."""

from __future__ import annotations

import math

import pytest
import torch

import sparseworks as sw
from sparseworks.engine.decoder.generating import DecoderCache
from sparseworks.engine.decoder.native import NativeDecoder
from sparseworks.engine.decoder.reading import read_model
from sparseworks.kernels.native import available
from sparseworks.kernels.panel_packing import pack_panels
from sparseworks.kernels.panel_products import unpack_panels
from sparseworks.kernels.panels import Format

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.data, pytest.mark.skipif(not available(), reason="the native kernels are not built")
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(data_root):
    folder = data_root / "models" / "novel-llama-6m"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (data_root / "text" / "novels-valid.txt").read_text()[:12_000]
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return model, ids[: ids.numel() // 128 * 128].view(-1, 128)[:8]


def perplexity(decoder, windows, one_by_one=False):
    losses = []
    for ids in windows:
        if one_by_one:
            past = DecoderCache(decoder.native)
            parts = [decoder(ids[None, i : i + 1], cache=past).logits for i in range(ids.numel())]
            logits = torch.cat(parts, 1)[0]
        else:
            logits = decoder(ids[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    return math.exp(float(torch.cat(losses).double().mean()))


def dequantized(model, decoder):
    """The same weights, exactly, in fp32."""
    spec = read_model(model)
    for mine, packed in zip(spec.linears(), decoder.native.spec.linears(), strict=True):
        mine.weight = pack_panels(unpack_panels(packed.weight), Format.FLOAT).panels
    native = NativeDecoder(spec, "fp32")
    return type(decoder)(decoder.config, native, decoder.report)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("pattern", [None, "unstructured", "2:4", "block1x16"])
def test_perplexity_is_that_of_the_packed_weights(trained, dtype, pattern):
    import copy

    model, windows = trained
    if pattern is not None:
        model = copy.deepcopy(model)
        sw.prune(model, "magnitude", sparsity=0.5, pattern=pattern)
    decoder = sw.compile_decoder(model, dtype=dtype)
    wanted = perplexity(dequantized(model, decoder), windows)
    assert perplexity(decoder, windows) == pytest.approx(wanted, rel=1e-3)
    few = windows[:2]  # the kernels of one vector
    wanted = perplexity(dequantized(model, decoder), few)
    assert perplexity(decoder, few, one_by_one=True) == pytest.approx(wanted, rel=1e-3)


def test_data_lowers_what_rounding_costs(trained):
    model, windows = trained
    plain = sw.compile_decoder(model, dtype="int4")
    aware = sw.compile_decoder(model, dtype="int4", data=[{"input_ids": windows[4:]}])
    exact = perplexity(sw.compile_decoder(model, dtype="fp32"), windows[:4])
    costs = [perplexity(d, windows[:4]) - exact for d in (plain, aware)]
    assert costs[1] < costs[0]
