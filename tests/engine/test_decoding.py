"""Greedy generation against transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine import decoding

transformers = pytest.importorskip("transformers")


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0, **changes,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():  # in bf16 exactly, so that packing changes nothing
        for p in model.parameters():
            p.copy_(3 * p.bfloat16())
    return model


@pytest.fixture(params=["masked", "indexed", "dense"])
def layout(request, monkeypatch):
    """Make one layout win everywhere."""
    place = {"dense": 0, "masked": 1, "indexed": 2}[request.param]

    def times(*runs, repeats=1):
        for run in runs:
            run()
        return [0.0 if i == min(place, len(runs) - 1) else 1.0 for i in range(len(runs))]

    monkeypatch.setattr(decoding, "interleaved_ms", times)
    return request.param


def test_the_same_tokens_as_transformers(layout):
    model = llama()
    sw.prune(model, "magnitude", sparsity=0.85)
    decoder = sw.compile_decoder(model)
    ids = torch.randint(2, 97, (1, 7))
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(decoder.generate(ids, 12), wanted)
    expected = {"dense": "dense", "masked": "MaskedRows", "indexed": "IndexedRows"}[layout]
    assert expected in decoder.explain()


def test_several_texts_and_their_ends():
    model = llama()
    sw.prune(model, "magnitude", sparsity=0.7)
    decoder = sw.compile_decoder(model)
    ids = torch.randint(2, 97, (3, 5))
    free = decoder.generate(ids, 10)
    end = int(free[0, 8])  # a token that the first text reaches
    found = decoder.generate(ids, 10, eos_token_id=end)
    for text, before in zip(found, free, strict=True):
        new, old = text[5:].tolist(), before[5:].tolist()
        stop = old.index(end) + 1 if end in old else len(new)
        assert new[:stop] == old[:stop] and all(t == end for t in new[stop:])


def test_int8_stays_close():
    model = llama()
    sw.prune(model, "magnitude", sparsity=0.5)
    decoder = sw.compile_decoder(model, int8=True)
    ids = torch.randint(2, 97, (1, 4))
    with torch.no_grad():
        wanted, found = model(ids).logits, decoder.model(ids).logits
    assert float((wanted - found).norm() / wanted.norm()) < 0.05


def test_bf16_models_keep_their_dtype():
    model = llama(torch.bfloat16)
    sw.prune(model, "magnitude", sparsity=0.85)
    decoder = sw.compile_decoder(model)
    ids = torch.randint(2, 97, (1, 4))
    with torch.no_grad():
        wanted, found = model(ids).logits, decoder.model(ids).logits
    assert found.dtype == torch.bfloat16
    assert float((wanted - found).float().norm() / wanted.float().norm()) < 0.03
    assert decoder.generate(ids, 3).shape == (1, 7)


def test_misuse_is_refused():
    with pytest.raises(ModelError, match="not a causal language model"):
        sw.compile_decoder(nn.Linear(2, 2))
    model = llama()
    decoder = sw.compile_decoder(model)
    for ids, new in ((torch.zeros(3, dtype=torch.long), 2), (torch.zeros(1, 0).long(), 2),
                     (torch.ones(1, 2).long(), 0)):  # fmt: skip
        with pytest.raises(InvalidArgument, match="at least"):
            decoder.generate(ids, new)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        sw.compile_decoder(model)
