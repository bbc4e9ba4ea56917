"""Attention that models spell out becomes the operation that it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparseworks.engine.graph import capture
from sparseworks.engine.ir import Attention
from sparseworks.engine.plan import make_plan
from sparseworks.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")

H, D, S, B = 4, 6, 17, 3
C = H * D


def planned(model, *inputs, attentions=1, parts=1):
    """A plan that computes what the model does, also for one entry, with its attention native."""
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= torch.rand(p.shape) < 0.5
    model = model.eval()
    plan = make_plan(capture(model, inputs, {}), 2)
    assert plan is not None
    with torch.no_grad():
        for given in (inputs, [x[:1] for x in inputs]):
            torch.testing.assert_close(plan(*given), model(*given), rtol=1e-4, atol=1e-5)
    ops = [op for part in plan.parts for op in part.ops if isinstance(op, Attention)]
    assert len(ops) == attentions and len(plan.parts) == parts
    calls = [s.target for s in plan.rest if s not in plan.parts]
    assert not any(word in c for c in calls for word in ("softmax", "mm", "linear", "einsum"))
    return plan


def split(x, heads=H):
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).reshape(x.shape[0], -1, C)


def plain(q, k, v):
    return joined(F.softmax(split(q) @ split(k).transpose(-1, -2) / math.sqrt(D), -1) @ split(v))


def scaled_before(q, k, v):
    scores = (split(q) * D**-0.5) @ split(k).mT
    return joined(F.dropout(scores.softmax(-1), 0.1, False) @ split(v))


def scaled_twice(q, k, v):
    scores = torch.matmul(split(q) * 0.7, split(k).transpose(2, 3) * 0.6) * 2
    return joined(torch.matmul(F.softmax(scores.float(), dim=-1, dtype=torch.float32), split(v)))


def keys_first(q, k, v):
    scores = split(k) @ split(q).transpose(-1, -2) * D**-0.5
    return joined(scores.softmax(2).transpose(2, 3).contiguous() @ split(v))


def values_first(q, k, v):
    weights = (split(q) @ split(k).transpose(-1, -2)).softmax(-1)
    out = split(v).transpose(-1, -2) @ weights.transpose(-1, -2)
    return out.permute(0, 3, 1, 2).reshape(q.shape[0], -1, C)


def in_batches(q, k, v):
    q, k, v = (split(x).reshape(-1, x.shape[1], D) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) * D**-0.5
    return joined(torch.bmm(scores.softmax(-1), v).view(-1, H, q.shape[1], D))


def einsum_of_heads(q, k, v):
    q, k, v = (x.unflatten(2, (H, D)) for x in (q, k, v))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(D**-0.5).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


def einsum_with_heads_last(q, k, v):
    q, k, v = (x.unflatten(2, (H, D)) for x in (q, k, v))
    weights = torch.einsum("b i h d, b j h d -> b j i h", q, k).softmax(1)
    return torch.einsum("bjih,bjhd->bihd", weights, v).flatten(2)


def heads_inside(q, k, v):
    q, k, v = (x.view(x.shape[0], x.shape[1], D, H).permute(0, 3, 1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return (weights @ v).permute(0, 2, 3, 1).flatten(2)


def one_head(q, k, v):
    return (q @ k.transpose(1, 2) / C**0.5).softmax(-1) @ v


WAYS = [plain, scaled_before, scaled_twice, keys_first, values_first, in_batches,
        einsum_of_heads, einsum_with_heads_last, one_head]  # fmt: skip


class Layer(nn.Module):
    def __init__(self, way, kv=C, extra=None):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, kv), nn.Linear(C, kv)
        self.out, self.way = nn.Linear(C, C), way
        if extra is not None:
            self.extra = nn.Parameter(extra)

    def forward(self, x, *more):
        extra = (self.extra,) if hasattr(self, "extra") else ()
        return x + self.out(self.way(self.q(x), self.k(x), self.v(x), *extra, *more))


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
def test_products_softmax_products(way):
    torch.manual_seed(0)
    planned(Layer(way), torch.randn(B, S, C))


def test_heads_that_do_not_lie_side_by_side_stay_with_torch():
    torch.manual_seed(0)
    model = Layer(heads_inside).eval()
    plan, x = make_plan(capture(model, (torch.randn(B, S, C),), {}), 1), torch.randn(B, S, C)
    torch.testing.assert_close(plan(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert not any(part.attends for part in plan.parts)


@pytest.mark.parametrize("way", ["unbound", "split", "chunks"])
def test_fused_projections(way):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

        def forward(self, x):
            b, s, _ = x.shape
            if way == "unbound":  # as timm without fused attention
                q, k, v = self.qkv(x).reshape(b, s, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
            elif way == "split":
                q, k, v = (t.view(b, s, H, D).transpose(1, 2) for t in self.qkv(x).split(C, 2))
            else:
                q, k, v = self.qkv(x).view(b, s, H, 3 * D).transpose(1, 2).chunk(3, -1)
            y = ((q * D**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
            return self.out(y.transpose(1, 2).reshape(b, s, C))

    torch.manual_seed(0)
    if way == "chunks":  # heads of q, k and v in turn: not side by side
        model = Fused().eval()
        plan, x = make_plan(capture(model, (torch.randn(B, S, C),), {}), 1), torch.randn(B, S, C)
        torch.testing.assert_close(plan(x), model(x).detach(), rtol=1e-4, atol=1e-5)
        return
    planned(Fused(), torch.randn(B, S, C))


def repeated(q, k, v):
    k, v = (split(x, 2).repeat_interleave(2, dim=1) for x in (k, v))
    return joined((split(q) @ k.transpose(2, 3)).softmax(-1) @ v)


def expanded(q, k, v):
    b, s, _ = q.shape
    k, v = (split(x, 2)[:, :, None].expand(b, 2, 2, s, D).reshape(b, 4, s, D) for x in (k, v))
    return joined((split(q) @ k.transpose(2, 3)).softmax(-1) @ v)


def grouped(q, k, v):
    q = q.view(q.shape[0], q.shape[1], 2, 2, D)
    k, v = (x.unflatten(2, (2, D)) for x in (k, v))
    weights = torch.einsum("bigrd,bjgd->bgrij", q, k).softmax(-1)
    return torch.einsum("bgrij,bjgd->bigrd", weights, v).flatten(2)


def one_key_for_all(q, k, v):
    return joined((split(q) @ k[:, None, :, :D].transpose(2, 3)).softmax(-1) @ v[:, None, :, :D])


def fused_with_repeats(q, k, v):
    k, v = (split(x, 2).repeat_interleave(2, 1) for x in (k, v))
    return joined(F.scaled_dot_product_attention(split(q), k, v))


@pytest.mark.parametrize(
    "way", [repeated, expanded, grouped, one_key_for_all, fused_with_repeats],
    ids=lambda w: w.__name__,
)  # fmt: skip
def test_queries_that_share_heads(way):
    torch.manual_seed(0)
    planned(Layer(way, 2 * D), torch.randn(B, S, C))


def scores_of(q, k):
    return split(q) @ split(k).transpose(-1, -2) * D**-0.5


def added(q, k, v, mask):
    extended = (1.0 - mask[:, None, None, :]) * torch.finfo(torch.float32).min
    return joined((scores_of(q, k) + extended).softmax(-1) @ split(v))


def filled(q, k, v, mask):
    scores = scores_of(q, k).masked_fill(mask[:, None, None, :] == 0, -1e9)
    return joined(scores.softmax(-1) @ split(v))


def chosen(q, k, v, mask):
    scores = torch.where(mask[:, None, None, :] > 0, scores_of(q, k), -torch.inf)
    return joined(scores.softmax(-1) @ split(v))


def causal(q, k, v, mask):
    s = q.shape[1]
    past = torch.ones(s, s, dtype=torch.bool).tril()
    scores = scores_of(q, k).masked_fill(~past, -torch.inf)
    scores = scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return joined(scores.softmax(-1) @ split(v))


def into_the_product(q, k, v, mask):
    q, k, v = (split(x).reshape(-1, x.shape[1], D) for x in (q, k, v))
    slopes = torch.arange(1, H + 1) * 0.1
    bias = mask[:, None, None, :] * slopes[None, :, None, None]
    bias = bias.reshape(-1, 1, q.shape[1])  # as ALiBi in BLOOM
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=0.5, alpha=D**-0.5)
    return joined((scores.softmax(-1) @ v).view(-1, H, q.shape[1], D))


@pytest.mark.parametrize(
    "way", [added, filled, chosen, causal, into_the_product], ids=lambda w: w.__name__
)
def test_masks(way):
    torch.manual_seed(0)
    mask = torch.ones(B, S)
    mask[0, 11:] = 0
    mask[2, 5:] = 0
    planned(Layer(way), torch.randn(B, S, C), mask)


def biased(q, k, v, bias):
    return joined((scores_of(q, k) + bias).softmax(-1) @ split(v))


def biased_in_batches(q, k, v, bias):
    q, k, v = (split(x).reshape(-1, x.shape[1], D) for x in (q, k, v))
    scores = (q @ k.mT).view(-1, H, S, S) + bias
    return joined((scores.view(-1, S, S).softmax(-1) @ v).view(-1, H, S, D))


def biased_with_heads_last(q, k, v, bias):
    q, k, v = (x.unflatten(2, (H, D)) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bijh", q, k) + bias.permute(1, 2, 0)
    return torch.einsum("bijh,bjhd->bihd", scores.softmax(2), v).flatten(2)


def biased_and_masked(q, k, v, bias, mask):
    bias = bias + (1.0 - mask[:, None, None, :]) * -1e9  # one tensor, as T5 has it
    return joined(((scores_of(q, k) + bias) * 0.5).softmax(-1) @ split(v))


def fused_and_biased(q, k, v, bias, mask):
    bias = bias.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return joined(F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=bias))


@pytest.mark.parametrize(
    "way",
    [biased, biased_in_batches, biased_with_heads_last, biased_and_masked, fused_and_biased],
    ids=lambda w: w.__name__,
)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "base"])
def test_position_biases(way, isa, force_isa):
    force_isa(isa)
    torch.manual_seed(0)
    masks = [torch.ones(B, S)] if "mask" in way.__name__ or "fused" in way.__name__ else []
    for mask in masks:
        mask[0, 11:] = 0
    model = Layer(way, extra=torch.randn(H, S, S))
    plan = planned_without_thinning(model, torch.randn(B, S, C), *masks)
    assert sum(isinstance(op, Attention) for part in plan.parts for op in part.ops) == 1


def planned_without_thinning(model, *inputs):
    model = model.eval()
    plan = make_plan(capture(model, inputs, {}), 2)
    with torch.no_grad():
        torch.testing.assert_close(plan(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    return plan


@pytest.mark.parametrize("keys", [3, 16, 33, 70])
def test_biases_of_any_length(keys):
    torch.manual_seed(0)
    model = Layer(biased, extra=torch.randn(H, keys, keys))
    plan = planned_without_thinning(model, torch.randn(2, keys, C))
    assert any(part.biases for part in plan.parts)


def test_weights_that_are_returned_are_made_by_torch():
    class Both(Layer):
        def forward(self, x):
            q, k, v = self.q(x), self.k(x), self.v(x)
            weights = scores_of(q, k).softmax(-1)
            return self.out(joined(weights @ split(v))), weights

    torch.manual_seed(0)
    model = Both(None).eval()
    x = torch.randn(B, S, C)
    plan = make_plan(capture(model, (x,), {}), 1)
    with torch.no_grad():
        torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-5)


def test_encoders_of_transformers_spelt_out():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=C, num_hidden_layers=2, num_attention_heads=H, intermediate_size=32,
        vocab_size=50, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids, mask = torch.randint(0, 50, (B, S)), torch.ones(B, S, dtype=torch.long)
    mask[1, 9:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    plan = make_plan(capture(model, (), given), 1)
    with torch.no_grad():
        found, wanted = plan(**given)[0], model(**given)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(plan.parts) == 1
    assert sum(isinstance(op, Attention) for op in plan.parts[0].ops) == 2


class Windows(nn.Module):
    """Attention in windows of an image, shifted, as Swin spells it out."""

    def __init__(self, side, window, masked=True):
        super().__init__()
        self.side, self.window, self.masked = side, window, masked
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        places, count = window**2, (side // window) ** 2
        self.bias = nn.Parameter(torch.randn(H, places, places))
        hidden = torch.rand(count, places, places) > 0.7
        hidden &= ~torch.eye(places, dtype=torch.bool)
        self.register_buffer("mask", torch.zeros(hidden.shape).masked_fill(hidden, -100.0))

    def forward(self, x):
        b, n, w = x.shape[0], self.side // self.window, self.window
        y = torch.roll(x.view(b, self.side, self.side, C), (-1, -1), (1, 2))
        y = y.view(b, n, w, n, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)
        q, k, v = self.qkv(y).view(-1, w * w, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * D**-0.5) @ k.transpose(-2, -1) + self.bias[None]
        if self.masked:
            scores = scores.view(b, n * n, H, w * w, w * w) + self.mask[None, :, None]
            scores = scores.view(-1, H, w * w, w * w)
        y = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, w * w, C))
        y = y.view(b, n, n, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(b, self.side, self.side, C)
        return x + torch.roll(y, (1, 1), (1, 2)).reshape(b, -1, C)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("side", "window"), [(12, 4), (14, 7)])
def test_windows_of_images(side, window, masked):
    torch.manual_seed(0)
    model, x = Windows(side, window, masked).eval(), torch.randn(B, side**2, C)
    plan = make_plan(capture(model, (x,), {}), 2)
    with torch.no_grad():
        for given in (x, x[:1]):
            torch.testing.assert_close(plan(given), model(given), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(op, Attention) for part in plan.parts for op in part.ops) == 1


def test_what_each_window_adds_to_its_heads_stays_with_torch():
    class Model(Windows):
        def __init__(self):
            super().__init__(8, 4)
            self.mask = torch.randn(4, H, 16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x.view(-1, 16, C)).view(-1, 16, 3, H, D).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-2, -1)).view(-1, 4, H, 16, 16) + self.mask
            y = scores.view(-1, H, 16, 16).softmax(-1) @ v
            return self.out(y.transpose(1, 2).reshape(x.shape[0], 64, C))

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(B, 64, C)
    plan = make_plan(capture(model, (x,), {}), 1)
    with torch.no_grad():
        torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-5)
