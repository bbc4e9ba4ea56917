"""The gates of EvoMoE, graph of tokens and MoE-LLaVA against loops in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sparseworks as sw
import tiny_models
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.experts.banks import Experts
from sparseworks.experts.evo_moe import DenseToSparse, EvoMoE, gumbel, sparsity_loss
from sparseworks.experts.graph_of_tokens import AttentionAware, SimilarityAware
from sparseworks.experts.layers import MoE
from sparseworks.experts.moe_llava import MoELLaVA, NoisySecond
from sparseworks.experts.routers import TopK
from sparseworks.experts.routing import Routing
from sparseworks.models.zoo import ByteDecoder, FeedForward


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def sharp(router, scale: float = 40.0):
    with torch.no_grad():
        router.weight.mul_(scale)
    return router.double()


def softmax(z: list[float]) -> list[float]:
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


@pytest.mark.parametrize("weights", ["clean", "gate"])
def test_the_dense_to_sparse_gate_is_its_formula(weights, monkeypatch):
    noise = inputs(30, 5)
    monkeypatch.setattr("sparseworks.experts.evo_moe.gumbel", lambda like: noise)
    router = sharp(DenseToSparse(5, 7, tau=0.4, threshold=0.05, weights=weights)).train()
    x = inputs(30, 7)
    found = router(x)
    aux = [[0.0, 0.0] for _ in range(5)]
    for t in range(30):
        z = (router.weight @ x[t]).tolist()
        g = softmax([(a + n.item()) / 0.4 for a, n in zip(z, noise[t])])
        w = softmax(z) if weights == "clean" else g
        for i in range(5):
            own = w[i] if g[i] > 0.05 else 0.0
            assert found.weights[t, i].item() == pytest.approx(own, abs=1e-12)
            assert bool(found.chosen[t, i]) == (g[i] > 0.05)
            aux[i][0] += own / 30
            aux[i][1] += (g[i] > 0.05) / 30
    wanted = 25 * sum(a * b for a, b in aux) / 5
    assert sparsity_loss(found).item() == pytest.approx(wanted)
    router.hard = True
    hard = router(x)
    for t in range(30):
        z = (router.weight @ x[t]).tolist()
        best = max(range(5), key=lambda i: z[i] + noise[t, i].item())
        assert hard.chosen[t].nonzero().flatten().tolist() == [best]
        assert hard.weights[t, best].item() == pytest.approx(softmax(z)[best])
    clean = router.eval()(x)
    assert torch.equal(clean.weights.argmax(1), (x @ router.weight.T).argmax(1))
    assert clean.chosen.sum(1).eq(1).all()


def test_without_noise_and_threshold_it_is_the_dense_mixture():
    bank = Experts(4, 7, 5).double()
    gate = sharp(DenseToSparse(4, 7, threshold=0.0))
    gate.soft_evaluation = True
    layer = MoE(gate, bank).double().eval()
    x = inputs(9, 7)
    ones = torch.ones(9, 4, dtype=torch.float64)
    p = (x @ gate.weight.T).softmax(-1)
    torch.testing.assert_close(layer(x), bank(x, Routing(p, ones > 0, p, p)))
    assert sparsity_loss(layer.routing).item() == pytest.approx(4 * 1.0)  # N with all active


@pytest.mark.parametrize(
    ("tau", "deviation", "wanted"),
    [(1.0, 0, 7.9), (1.0, 1, 7.8), (1.0, 4, 4.6), (0.5, 1, 5.5), (0.3, 0, 4.1), (0.1, 1, 1.6)],
)
def test_active_experts_are_as_many_as_simulated(tau, deviation, wanted):
    torch.manual_seed(0)
    g = ((deviation * torch.randn(20_000, 8) + gumbel(torch.empty(20_000, 8))) / tau).softmax(-1)
    assert (g > 0.001).sum(1).float().mean().item() == pytest.approx(wanted, abs=0.1)


def test_the_temperature_falls_and_the_gate_becomes_hard():
    model = tiny_models.language_model()
    method = EvoMoE(experts=4, tau_start=2.0, tau_end=0.5, anneal=0.5, hard=0.5)
    run = sw.upcycle(model, method, steps=8)
    gate = run.layers["model.layers.0.mlp"].gate
    seen = [gate.tau]
    for _ in range(8):
        run.advance()
        seen.append(gate.tau)
        assert gate.hard == (run.step >= 4)
    assert seen[:5] == pytest.approx([2, 2**0.5, 1, 2**-0.5, 0.5]) and seen[-1] == 0.5
    assert EvoMoE(schedule="linear", anneal=1.0).temperature(0.5) == pytest.approx(1.05)
    state = run.state_dict()
    again = sw.upcycle(tiny_models.language_model(), method, steps=8)
    again.load_state_dict(state)
    assert again.layers["model.layers.0.mlp"].gate.hard and again.step == 8


def test_copies_differ_by_the_share_that_is_masked():
    model = tiny_models.language_model()
    dense = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    run = sw.upcycle(model, "evomoe", experts=4, diversify=0.25)
    bank = run.layers["model.layers.0.mlp"].experts.down_proj.detach()
    assert (bank == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(bank, dense * (bank != 0)) and not torch.equal(bank[0], bank[1])


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_similarity_routing_is_a_double_loop(keep):
    router = sharp(SimilarityAware(5, 7, 2, tau=0.2, keep=keep))
    x = inputs(2, 6, 7)
    found, s = router(x), router.similarity(x)
    torch.testing.assert_close(s.sum(-1), torch.ones(2, 6, dtype=torch.float64))
    r = (x @ router.weight.T).softmax(-1)
    for b in range(2):
        for i in range(6):
            scores = [
                (x[b, i] @ x[b, j]).item() / (x[b, i].norm() * x[b, j].norm()).item() / 0.2
                for j in range(i + 1)
            ]
            votes = sum(w * r[b, j] for j, w in enumerate(softmax(scores)))
            votes = (1 - keep) * votes + keep * r[b, i]
            torch.testing.assert_close(found.probabilities[b, i], votes)
            best = votes.topk(2).indices.tolist()
            assert set(found.chosen[b, i].nonzero().flatten().tolist()) == set(best)
            torch.testing.assert_close(found.weights[b, i, best], votes[best] / votes[best].sum())


def test_with_the_identity_it_is_the_usual_router_and_the_future_does_not_leak():
    x = inputs(2, 6, 7)
    usual = sharp(TopK(5, 7, 2, generator=torch.Generator().manual_seed(4)))
    same = sharp(SimilarityAware(5, 7, 2, keep=1.0, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(usual(x).weights, same(x).weights)
    same.keep = 0.0
    other = x.clone()
    other[:, 4:] = inputs(2, 2, 7) + 1
    assert torch.equal(same(x).weights[:, :4], same(other).weights[:, :4])


def test_attention_routing_averages_heads_and_needs_them():
    router = sharp(AttentionAware(5, 7, 2))
    x = inputs(2, 6, 7)
    attention = inputs(2, 3, 6, 6).softmax(-1).requires_grad_()
    found = router(x, attention)
    r = (x @ router.weight.T).softmax(-1)
    wanted = sum(attention[:, h] @ r for h in range(3)) / 3
    torch.testing.assert_close(found.probabilities, wanted.detach(), check_dtype=True)
    assert torch.autograd.grad(found.weights.sum(), attention, allow_unused=True) == (None,)
    eye = torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6)
    torch.testing.assert_close(router(x, eye).probabilities, r)
    with pytest.raises(ModelError, match="use_cache"):
        router(x, attention[..., :5])
    with pytest.raises(ModelError, match="eager"):
        MoE(router, Experts(5, 7, 4).double())(x)


def test_attention_comes_from_the_block_before():
    model = tiny_models.language_model()
    with pytest.raises(ModelError, match="eager"):
        sw.upcycle(model, "graph-of-tokens", by="attention")
    model.set_attn_implementation("eager")
    assert model.config.use_cache
    run = sw.upcycle(model, "graph-of-tokens", experts=4, by="attention")
    assert not model.config.use_cache
    ids = tiny_models.texts()[0]["input_ids"]
    with torch.no_grad():
        output = model(ids, output_attentions=True)
    for layer, seen in zip(run.layers.values(), output.attentions, strict=True):
        r = layer.routing.logits.softmax(-1)
        torch.testing.assert_close(layer.routing.probabilities, seen.mean(1) @ r)
    decoder = ByteDecoder(32, 1, 2, mlp=lambda: FeedForward(32, 48))
    with torch.no_grad():
        plain = decoder(ids)
        sw.upcycle(decoder, "graph-of-tokens", experts=4, by="attention")
        torch.testing.assert_close(decoder(ids), plain, rtol=1e-4, atol=1e-5)


def test_the_second_choice_is_drawn_in_training_only():
    router = sharp(NoisySecond(6, 7, 2), 10.0)
    x = inputs(400, 7)
    p = (x @ router.weight.T).softmax(-1)
    torch.manual_seed(0)
    found = router.train()(x)
    first = p.argmax(1, keepdim=True)
    assert found.chosen.sum(1).eq(2).all() and found.chosen.gather(1, first).all()
    kept = p * found.chosen
    torch.testing.assert_close(found.weights, kept / kept.sum(1, keepdim=True))
    rest = p.scatter(1, first, 0.0)  # Gumbel noise draws the second in proportion to p
    drawn = found.chosen.double().scatter(1, first, 0.0)
    torch.testing.assert_close(
        drawn.mean(0), (rest / rest.sum(1, keepdim=True)).mean(0), rtol=0, atol=0.07
    )
    assert torch.equal(router.eval()(x).weights, sharp_top(p))


def sharp_top(p: Tensor) -> Tensor:
    best = p.topk(2).indices
    kept = torch.zeros_like(p).scatter(1, best, p.gather(1, best))
    return kept / kept.sum(1, keepdim=True)


def test_moe_llava_keeps_the_function_and_trains_mlps_alone():
    model = tiny_models.language_model()
    ids = tiny_models.texts()[0]
    with torch.no_grad():
        before = model(**ids).logits
    run = sw.upcycle(model, "moe-llava")
    assert list(run.layers) == ["model.layers.0.mlp"]
    with torch.no_grad():
        after = model(**ids).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".mlp." in n}
    layer = run.layers["model.layers.0.mlp"]
    run.reset()
    model.train()(**ids)
    assert 0.005 < run.penalty().item() < 0.04
    places = math.ceil(1.5 * 2 * 60 / 4)
    assert layer.load.counts.max() <= places and layer.load.tokens == 60
    run.finish()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: EvoMoE(tau_end=0.0),
        lambda: EvoMoE(tau_start=0.1, tau_end=0.5),
        lambda: EvoMoE(threshold=0.5),
        lambda: EvoMoE(diversify=1.0),
        lambda: EvoMoE(schedule="cosine"),  # type: ignore[arg-type]
        lambda: MoELLaVA(top_k=1),
        lambda: MoELLaVA(trains="router"),  # type: ignore[arg-type]
        lambda: sw.methods.GraphOfTokens(by="value"),
        lambda: sw.methods.GraphOfTokens(tau=0.0),
        lambda: sw.methods.GraphOfTokens(keep=1.5),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(InvalidArgument):
        make()
