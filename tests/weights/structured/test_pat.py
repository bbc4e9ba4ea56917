"""PAT: its schedules and loss against the formulas, and the cut against the masked model."""

from __future__ import annotations

import copy
import math
from itertools import chain

import pytest
import torch

import sparseworks as sw
import tiny_models
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.modes import hooked
from sparseworks.training.lora import LowRankUpdates
from sparseworks.weights.structured import load_slim, save_slim
from sparseworks.weights.structured.hybrid import HybridSparsification
from sparseworks.weights.structured.pat import narrow

FAST = {"warmup": 0, "rank": 4, "lora_rank": 2, "lr": 1e-3}


def slimmed(epochs=4, **options):
    model = tiny_models.language_model()
    texts = tiny_models.texts()
    return sw.slim(model, texts[0], method="pat", data=texts, epochs=epochs, **{**FAST, **options})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma"])
def test_the_cut_computes_what_the_hard_mask_does(kind, tied, monkeypatch):
    def norm(self, x):  # transformers computes its own in fp32, whatever the model is in
        gain = self.weight + 1 if kind == "Gemma" else self.weight
        eps = self.eps if kind == "Gemma" else self.variance_epsilon
        return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    more = {"tie_word_embeddings": tied, "rms_norm_eps": 1e-2}
    if kind == "Gemma":
        more["head_dim"] = 8
    model = tiny_models.language_model(kind, **more).double()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * draw(*parameter.shape))
    monkeypatch.setattr(type(model.model.norm), "forward", norm)
    layers = model.model.layers
    hybrid = HybridSparsification(32, 5, 6, 10, 0, model.model.embed_tokens.weight.detach())
    linear = {f"{i}.{n}": m for i, layer in enumerate(layers) for n, m in layer.named_modules()
              if isinstance(m, torch.nn.Linear)}  # fmt: skip
    updates = LowRankUpdates(linear, 3, 4.0, 0.5, 0)
    with torch.no_grad():
        for parameter in [*hybrid.parameters(), *updates.parameters()]:
            parameter.add_(0.3 * draw(*parameter.shape))
    kept = hybrid.harden(20)
    assert kept.tolist() == sorted(hybrid.logits.topk(20).indices.tolist())
    ids = tiny_models.texts()[0]["input_ids"]
    with torch.no_grad():
        plain = model(ids).logits
        with hooked(chain(hybrid.handles(model.model.embed_tokens, layers), updates.handles())):
            masked = model(ids).logits
        assert float((plain - masked).abs().max()) > 0.01
        assert torch.equal(model(ids).logits, plain)
        updates.fold()
        narrow(model, kept, [hybrid.basis(i, kept) for i in range(5)])
        cut = model(ids).logits
    assert model.model.embed_tokens.weight.shape[1] == model.config.hidden_size == 20
    torch.testing.assert_close(cut, masked, rtol=0, atol=1e-10)


def test_mask_temperature_and_offset_follow_the_schedule():
    hybrid = HybridSparsification(8, 1, 2, 1000, 0, torch.zeros(1))
    with torch.no_grad():
        hybrid.logits.copy_(torch.linspace(-1, 1, 8))
    a = torch.linspace(-1, 1, 8)
    for t, tau, b in (
        (1, 1 / (1 + 1e-6), 0.499),
        (500, 1 / (1 - math.log(500) / math.log(1000) + 1e-6), 0.0),
        (800, 1 / (1 - math.log(800) / math.log(1000) + 1e-6), 0.0),
        (1000, 1 / (1 - math.log(800) / math.log(1000) + 1e-6), 0.0),
    ):
        hybrid.step = t
        torch.testing.assert_close(hybrid.mask().detach(), torch.sigmoid(tau * a) + b)
        assert hybrid.mask().requires_grad == (t < 800)
    assert 30 < hybrid.temperature < 32
    hybrid.step = 0
    with torch.no_grad():
        hybrid.logits.zero_()
    assert torch.equal(hybrid.mask().detach(), torch.ones(8))


def test_the_penalty_is_that_of_the_formula_and_pushes_towards_the_count():
    hybrid = HybridSparsification(4, 2, 3, 10, 0, torch.zeros(1))
    with torch.no_grad():
        hybrid.logits.copy_(torch.tensor([0.3, 0.0, -0.2, 0.9]))
    wanted = 10 * abs(3 - 2) / 2 + (0.2**2 + 0.4**2) / 2 + (0.5**2 + 0.3**2) / 2
    for down in hybrid.down:
        gram = down.detach() @ down.detach().T - torch.eye(3)
        wanted += float((gram**2).sum()) / 9
    found = hybrid.penalty(2, 10.0)
    assert abs(float(found.detach()) - wanted) < 1e-5
    found.backward()
    sides = torch.tensor([2 * (0.3 - 0.5) / 2, 0.5, 0.3, 2 * (0.9 - 0.5) / 2])
    torch.testing.assert_close(hybrid.logits.grad, 5.0 + sides)
    with torch.no_grad():
        hybrid.logits.zero_()  # no a > 0: a mean over nothing
    assert bool(torch.isfinite(hybrid.penalty(2, 10.0)))


def test_updates_are_those_of_lora_and_fold():
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 4).double()
    updates = LowRankUpdates({"x": layer}, 2, 3.0, 0.5, 0)
    x = torch.randn(7, 5, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        updates.up[0].copy_(torch.randn(4, 2))
    with hooked(updates.handles()), torch.no_grad():
        found = layer.eval()(x)
        spread = {tuple(layer.train()(x)[0].tolist()) for _ in range(8)}
    wanted = before + 1.5 * x @ updates.down[0].T @ updates.up[0].T
    torch.testing.assert_close(found, wanted.detach())
    assert len(spread) > 1, "no dropout"
    updates.fold()
    torch.testing.assert_close(layer(x), wanted)


def test_a_decoder_gets_narrower_and_a_folder_gives_it_back(tmp_path):
    texts = tiny_models.texts()
    before = {n: p.clone() for n, p in tiny_models.language_model().named_parameters()}
    done = slimmed(width=0.75)
    assert len(done.training["kept"]) == 24 and done.widths[0].after == 24
    assert dict(done.shapes)["model.layers.0.mlp.up_proj.weight"] == ((48, 32), (48, 24))
    assert done.model.model.norm.weight.requires_grad and not done.model.training
    kept = list(done.training["kept"])  # the head is not tuned, and gains are 1 here
    assert torch.equal(done.model.lm_head.weight, before["lm_head.weight"][:, kept])
    save_slim(done, tmp_path / "m")
    again = load_slim(tmp_path / "m")
    with torch.no_grad():
        wanted, found = done.model(**texts[0]).logits, again(**texts[0]).logits
    torch.testing.assert_close(found, wanted)
    config = type(done.model.config).from_pretrained(tmp_path / "m")
    assert config.hidden_size == 24


def test_the_count_is_reached_by_training_and_the_mask_is_hard():
    texts = tiny_models.texts() * 30
    model = tiny_models.language_model()
    done = sw.slim(model, texts[0], method="pat", data=texts, epochs=1, width=0.5,
                   anneal=0.8, mask_lr=0.1, **FAST)  # fmt: skip
    assert done.training["positive"] == 16
    assert done.training["softness"] < 0.1


@pytest.mark.parametrize("options", [
    {"width": 0.0}, {"rank": 0}, {"anneal": 0.0}, {"anneal": 0.01}, {"lr": 0.0},
    {"lora_dropout": 1.0}, {"width": 0.1, "multiple": 16},
])  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(InvalidArgument):
        slimmed(**options)


def test_other_models_are_refused_as_they_are():
    model = tiny_models.language_model("GPTNeoX", num_key_value_heads=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError):
        sw.slim(model, tiny_models.texts()[0], method="pat", data=tiny_models.texts(), epochs=4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
