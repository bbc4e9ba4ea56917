"""GGUF files say what the model said; where llama-cpp-python is, it agrees."""

from __future__ import annotations

import pytest
import torch

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.io.gguf import export_gguf

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")


def llama(**changes):
    torch.manual_seed(0)
    options = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
               "tie_word_embeddings": False} | changes  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((3 * p).half())
            if p.ndim == 2:
                p.mul_(torch.rand_like(p) < 0.5)
    return model


def test_tensors_are_those_of_the_model(tmp_path):
    model = llama()
    export_gguf(model, tmp_path / "m.gguf", "F16")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    down = torch.from_numpy(found["blk.1.ffn_down.weight"].data.copy()).float()
    assert torch.equal(down, model.model.layers[1].mlp.down_proj.weight)
    query = torch.from_numpy(found["blk.0.attn_q.weight"].data.copy()).float()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    assert torch.equal(query[1], weight[8])  # pairs stand side by side: 0, 8, 1, 9, ... of a head
    assert torch.equal(query[2], weight[1])
    assert len(found) == 3 + 2 * 9


def test_llama_cpp_computes_the_same(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    import numpy as np

    model = llama()
    export_gguf(model, tmp_path / "m.gguf", "F16")
    engine = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, verbose=False)
    ids = [3, 9, 40, 7]
    engine.eval(ids)
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(engine._ctx.ctx), shape=(96,))
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, -1]
    assert float((torch.from_numpy(found) - wanted).norm() / wanted.norm()) < 1e-2


def test_what_gguf_cannot_say_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(InvalidArgument, match="Q3"):
        export_gguf(llama(), path, "Q3")
    with pytest.raises(ModelError, match=r"_proj\.bias, which"):
        export_gguf(llama(attention_bias=True), path)
    with pytest.raises(ModelError, match="gpt2"):
        export_gguf(transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_layer=1, n_head=2, n_embd=8, vocab_size=9)), path)  # fmt: skip
    assert not path.exists()
