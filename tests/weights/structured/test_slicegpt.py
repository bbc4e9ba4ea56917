"""SliceGPT: rotating changes nothing, slicing is the projection that PCA says, folders load."""

from __future__ import annotations

import copy

import pytest
import torch

import sparseworks as sw
from sparseworks.core.errors import DataError, InvalidArgument, ModelError
from sparseworks.weights.structured import load_slim, save_slim
from sparseworks.weights.structured.sliced import SlicedLayer
from sparseworks.weights.structured.slicegpt import principal_basis
from tiny_models import DECODER_SIZES

transformers = pytest.importorskip("transformers")
SIZES = DECODER_SIZES | {"num_hidden_layers": 3}
FAMILIES = {
    "Llama": {"attention_bias": True},
    "Mistral": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Phi3": {"pad_token_id": 0},
    "Gemma": {"head_dim": 8},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                 "shared_expert_intermediate_size": 24},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def make(family, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # gains and biases that a rotation must not forget
                p.add_(0.3 * torch.rand(p.shape))
    generator = torch.Generator().manual_seed(1)
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in (torch.randint(3, 64, (3, 20), generator=generator) for _ in range(2))
    ]
    batches[0]["attention_mask"] = batches[0]["attention_mask"].clone()
    batches[0]["attention_mask"][0, 15:] = 0
    return model, batches


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("basis", ["block", "shared"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_before_slicing_the_function_is_unchanged(family, basis):
    model, batches = make(family)
    before = [logits(model, b) for b in batches]
    sw.slim(model, batches[0], method="slicegpt", slicing=0.0, basis=basis, data=batches)
    for batch, expected in zip(batches, before):
        kept = batch["attention_mask"].bool()
        torch.testing.assert_close(
            logits(model, batch)[kept], expected[kept], rtol=1e-5, atol=1e-5 * expected.abs().max()
        )


@pytest.mark.parametrize("basis", ["block", "shared"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen2Moe"])
def test_a_sliced_model_saves_loads_and_generates(family, basis, tmp_path):
    model, batches = make(family)
    result = sw.slim(model, batches[0], method="slicegpt", slicing=0.25, basis=basis, data=batches)
    assert result.widths[0].after == 24
    assert model.model.layers[1].self_attn.q_proj.in_features == 24
    assert sum(p.numel() for p in model.parameters()) == result.parameters[1]
    assert result.flops[1] < result.flops[0]
    assert isinstance(model.model.layers[0], SlicedLayer) == (basis == "block")
    assert isinstance(model.model.layers[0], type(make(family)[0].model.layers[0]))
    save_slim(result, tmp_path / "slim")
    again = load_slim(tmp_path / "slim")
    assert torch.equal(logits(again, batches[1]), logits(model, batches[1]))
    out = again.generate(batches[1]["input_ids"][:, :5], max_new_tokens=4, do_sample=False)
    assert out.shape == (3, 9)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batches[1]), logits(model, batches[1]))
    if basis == "shared":
        model.save_pretrained(tmp_path / "plain")
        plain = type(model).from_pretrained(tmp_path / "plain").eval()
        assert torch.equal(logits(plain, batches[1]), logits(model, batches[1]))


def test_the_basis_is_that_of_the_principal_components():
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    basis = principal_basis(x.t() @ x)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(6, dtype=torch.float64))
    _, _, v = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close((v @ basis).abs(), torch.eye(6, dtype=torch.float64), atol=1e-8,
                               rtol=0)  # fmt: skip


def test_a_stream_that_needs_few_directions_loses_nothing():
    """All that writes the stream has rank 16 in one basis: half of the width suffices."""
    model, batches = make("Llama", attention_bias=False)
    q, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2)))
    span = q[:, :16] @ q[:, :16].t()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ span)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(span @ writer.weight)
    before = logits(model, batches[1])
    for basis in ("block", "shared"):
        result = sw.slim(model, batches[1], method="slicegpt", slicing=0.5, basis=basis,
                         data=batches, copy=True)  # fmt: skip
        torch.testing.assert_close(logits(result.model, batches[1]), before, rtol=1e-4, atol=1e-5)
        other = sw.slim(model, batches[1], method="slicegpt", slicing=0.5, basis=basis,
                        order="random", data=batches, copy=True)  # fmt: skip
        assert (logits(other.model, batches[1]) - before).abs().max() > 1e-2


def test_deleting_columns_is_the_shared_basis_of_unit_vectors():
    model, batches = make("Llama", attention_bias=False)
    dense = copy.deepcopy(model)
    sw.slim(model, batches[0], method="slicegpt", slicing=0.25, basis="shared",
            order="magnitude", data=batches)  # fmt: skip
    kept = [
        int((dense.model.embed_tokens.weight == c[:, None]).all(0).nonzero()[0])
        for c in model.model.embed_tokens.weight.t()
    ]
    assert len(set(kept)) == 24
    gain = dense.model.layers[0].input_layernorm.weight
    expected = (dense.model.layers[0].self_attn.q_proj.weight * gain)[:, kept]
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight, expected)
    assert float(model.model.norm.weight.detach()[0]) == pytest.approx((32 / 24) ** 0.5)


@pytest.mark.parametrize("what", ["params", "flops"])
@pytest.mark.parametrize("basis", ["block", "shared"])
def test_a_target_is_met_by_the_widest_stream_that_meets_it(what, basis):
    model, batches = make("Llama", attention_bias=False, vocab_size=64)
    result = sw.slim(model, batches[0], method="slicegpt", basis=basis, multiple=1, data=batches,
                     copy=True, **{what: 0.8})  # fmt: skip
    before, after = result.parameters if what == "params" else result.flops
    assert after <= 0.8 * before
    wider = sw.slim(model, batches[0], method="slicegpt", basis=basis, multiple=1, data=batches,
                    copy=True, slicing=1 - (result.widths[0].after + 1) / 32)  # fmt: skip
    assert (wider.parameters if what == "params" else wider.flops)[1] > 0.8 * before


def test_what_cannot_be_sliced_is_refused_and_left_alone():
    model, batches = make("Llama")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    example = batches[0]
    with pytest.raises(DataError, match="data="):
        sw.slim(model, example, method="slicegpt", slicing=0.25)
    for options in ({"slicing": 1.0}, {"latency": 0.5}, {}, {"slicing": 0.2, "params": 0.5}):
        with pytest.raises(InvalidArgument):
            sw.slim(model, example, method="slicegpt", data=batches, **options)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(ModelError, match="knows decoders"):
        sw.slim(transformers.GPT2LMHeadModel(config), example, method="slicegpt", slicing=0.2,
                data=batches)  # fmt: skip
    model.model.layers[1].mlp.extra = torch.nn.Linear(32, 32)
    with pytest.raises(ModelError, match="extra"):
        sw.slim(model, example, method="slicegpt", slicing=0.2, data=batches)
    del model.model.layers[1].mlp.extra
    broken = [{"input_ids": torch.full((1, 4), 999)}]
    with pytest.raises(IndexError):
        sw.slim(model, example, method="slicegpt", slicing=0.2, data=broken)
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not model.config.tie_word_embeddings and type(model.model.layers[0]) is type(
        make("Llama")[0].model.layers[0]
    )
