"""Inputs of other sizes than the example's: right, cheap, and in the memory that was allowed."""

from __future__ import annotations

import random
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine import shared
from sparseworks.engine.geometry import arrange
from sparseworks.engine.graph import capture
from sparseworks.engine.guards import holds, written
from sparseworks.engine.ir import Precision
from sparseworks.engine.plan import make_plan
from sparseworks.engine.recent import Recent
from sparseworks.engine.taps import Packed
from sparseworks.kernels.native import available

native = pytest.mark.skipif(not available(), reason="the native kernels are not built")


class Encoder(nn.Module):
    """One layer of attention with a mask, and positions."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.heads = heads
        self.words, self.places = nn.Embedding(50, width), nn.Embedding(400, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids, mask):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :].bool())
        x = self.norm(x + self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.down(F.gelu(self.up(x)))


class Pictures(nn.Module):
    """Convolutions of every kind of reading, a shortcut, and a decoder."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.one, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(24, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        y = F.interpolate(F.relu(self.one(self.down(x))), scale_factor=2)
        z = self.last(torch.cat([x, y], 1))
        return z, self.head(F.adaptive_avg_pool2d(z, 1).flatten(1))


def compiled(model, *example, precision=Precision.FP32, threads=2, cache_bytes=16 << 20):
    torch.manual_seed(0)
    for p in model.eval().parameters():
        p.data = torch.randn(p.shape) * 0.3
        if p.ndim > 1:
            p.data *= torch.rand(p.shape) > 0.6
    plan = make_plan(capture(model, example, {}), threads, precision, cache_bytes)
    assert plan is not None
    return plan


def texts(batch, length, seed=0):
    g = torch.Generator().manual_seed(1000 * batch + length + seed)
    ids = torch.randint(0, 50, (batch, length), generator=g)
    kept = torch.randint(1, length + 1, (batch, 1), generator=g)
    return ids, (torch.arange(length) < kept).long()


def close(found, wanted, tolerance=1e-5):
    for a, b in zip(
        found if isinstance(found, tuple) else (found,),
        wanted if isinstance(wanted, tuple) else (wanted,),
        strict=True,
    ):
        assert a.shape == b.shape
        torch.testing.assert_close(
            a, b.detach(), rtol=0, atol=tolerance * float(b.detach().abs().max()) + 1e-6
        )


TEXTS = [(1, 3), (4, 17), (1, 130), (2, 64), (3, 65), (1, 1), (2, 300), (1, 16), (5, 129), (1, 257)]
IMAGES = [(1, 3, 64, 64), (2, 3, 40, 72), (17, 3, 20, 28), (1, 3, 24, 100), (3, 3, 128, 16)]


@native
@pytest.mark.parametrize("threads", [1, 2])
def test_texts_of_any_length_in_any_order(threads, monkeypatch):
    model = Encoder()
    plan = compiled(model, *texts(2, 20), threads=threads)
    monkeypatch.setattr(shared, "pack", None)  # nothing is packed again
    order = TEXTS * 2
    random.Random(0).shuffle(order)
    for size in order:
        given = texts(*size)
        close(plan(*given), model(*given))


@native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.INT8])
def test_images_of_any_size_in_any_order(threads, precision, monkeypatch):
    model = Pictures()
    plan = compiled(model, torch.randn(2, 3, 32, 32), precision=precision, threads=threads)
    monkeypatch.setattr(shared, "pack", None)
    order = IMAGES * 2
    random.Random(0).shuffle(order)
    tolerance = {Precision.FP32: 1e-5, Precision.BF16: 4e-2, Precision.INT8: 0.1}[precision]
    for size in order:
        x = torch.randn(size)
        close(plan(x), model(x), tolerance)


@native
def test_weights_are_had_once():
    model = Encoder()
    plan = compiled(model, *texts(1, 20))
    (part,) = plan.parts

    def addresses():
        packed = [p for p in part.shared.packed.values() if isinstance(p, Packed)]
        return [t.data_ptr() for p in packed for t in p.tensors.values()]

    before, size = addresses(), part.shared.bytes
    for text in TEXTS:
        plan(*texts(*text))
    assert addresses() == before and part.shared.bytes == size
    layers = (model.qkv, model.out, model.up, model.down)
    kept = sum(int(torch.count_nonzero(layer.weight)) for layer in layers)
    others = sum(4 * len(layer.bias) + 8 * (2 * len(layer.bias) + 1) for layer in layers)
    assert 6 * kept < size < 6 * kept + others


@native
def test_memory_stays_within_what_was_allowed():
    model = Encoder()
    plan = compiled(model, *texts(1, 20), cache_bytes=40_000)
    for length in range(2, 120):
        plan(*texts(1, length))
        assert 0 < plan.recent.bytes + plan.of_sizes.bytes <= 40_000
        assert plan.of_sizes.bytes <= 10_000
    kept = len(plan.recent)
    assert 1 < kept < 118
    plan(*texts(1, 2))
    arena = plan.parts[0].shared.arena
    plan(*texts(1, 300))
    most = arena.bytes
    for length in range(2, 300, 7):
        plan(*texts(1, length))
    assert arena.bytes == most  # one for all lengths
    loose = compiled(model, *texts(1, 20), cache_bytes=0)
    close(loose(*texts(2, 30)), model(*texts(2, 30)))
    assert len(loose.recent) == len(loose.of_sizes) == 0


@native
def test_four_threads_with_sizes_of_their_own():
    model = Encoder()
    plan = compiled(model, *texts(1, 20), cache_bytes=60_000)
    wanted = {size: model(*texts(*size)).detach() for size in TEXTS}

    def run(seed):
        order = TEXTS * 6
        random.Random(seed).shuffle(order)
        for size in order:
            close(plan(*texts(*size)), wanted[size], 1e-4)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


@native
def test_a_loaded_plan_has_its_weights_packed(program_wins, tmp_path, monkeypatch):
    model = Encoder()
    compiled(model, *texts(1, 20))
    made = sw.compile(model, texts(2, 20), cache_bytes=50_000)
    assert made.plan.cache_bytes == 50_000
    made.save(tmp_path / "model.plan")
    loaded = sw.load_compiled(tmp_path / "model.plan", cache_bytes=70_000)
    assert loaded.plan.cache_bytes == 70_000
    monkeypatch.setattr(shared, "pack", None)
    for size in TEXTS:
        assert torch.equal(loaded(*texts(*size)), made(*texts(*size)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        y = self.a(x)
        return y * 2 if x.shape[2] > 40 else y * 3


@native
@pytest.mark.parametrize("loaded", [False, True])
def test_sizes_for_which_the_model_does_something_else_are_refused(loaded, program_wins, tmp_path):
    made = sw.compile(Branching().eval(), torch.randn(2, 3, 32, 32))
    if loaded:
        made.save(tmp_path / "model.plan")
        made = sw.load_compiled(tmp_path / "model.plan")
    assert made(torch.randn(1, 3, 40, 50)).shape == (1, 4, 40, 50)
    with pytest.raises(InvalidArgument, match=r"x.shape\[2\] <= 40"):
        made(torch.randn(1, 3, 41, 50))


@native
def test_sizes_that_do_not_fit_are_refused_as_the_model_refuses_them():
    model = Pictures()
    plan = compiled(model, torch.randn(2, 3, 32, 32))
    for size in ((1, 3, 36, 32), (1, 3, 34, 32)):
        x = torch.randn(size)
        try:
            wanted = model(x)
        except RuntimeError:
            with pytest.raises((InvalidArgument, ModelError)):
                plan(x)
        else:
            close(plan(x), wanted)


class Resized(nn.Module):
    """Up to the size of its input, which is twice the size only where that is even."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.b(F.interpolate(F.relu(self.a(x)), size=x.shape[2:]))


@native
def test_an_enlargement_by_a_whole_number_is_that_or_refused():
    model = Resized()
    plan = compiled(model, torch.randn(2, 3, 16, 16))
    assert not any("upsample" in s.target for s in plan.steps if not hasattr(s, "ops"))
    x = torch.randn(1, 3, 20, 30)
    close(plan(x), model(x))
    with pytest.raises(InvalidArgument, match=r"x.shape\[2\]"):
        plan(torch.randn(1, 3, 21, 30))


class Fixed(nn.Module):
    """Whose weights fit one size alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 7)

    def forward(self, x):
        return self.b(F.relu(self.a(x)).flatten(1))


@native
def test_a_model_of_one_size_says_so():
    model = Fixed()
    plan = compiled(model, torch.randn(2, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    close(plan(x), model(x))
    with pytest.raises(InvalidArgument, match=r"shape|sizes"):
        plan(torch.randn(2, 3, 9, 8))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)), max_size=60), st.integers(0, 80))
def test_the_least_recently_used_go_first(uses, limit):
    recent, model = Recent(limit), OrderedDict()
    for key, size in uses:
        hit = key in model
        size = model.pop(key) if hit else size
        recent.get(key, lambda key=key, size=size: (f"value {key}", size))
        if hit or size <= limit:
            model[key] = size
        while sum(model.values()) > limit:
            model.popitem(last=False)
        assert recent.bytes == sum(model.values()) <= limit
        assert {k for k in range(7) if k in recent} == set(model)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8), st.integers(0, 8)), max_size=14))
def test_values_that_live_at_once_do_not_overlap(values):
    sizes = [16 * n for n, _, _ in values]
    lives = [(min(a, b), max(a, b)) for _, a, b in values]
    places, end = arrange(sizes, lives)
    for i in range(len(values)):
        assert 2048 <= places[i] <= end - 2048 - sizes[i]
        for j in range(i):
            apart = lives[i][1] < lives[j][0] or lives[j][1] < lives[i][0]
            beside = places[i] + sizes[i] <= places[j] or places[j] + sizes[j] <= places[i]
            assert apart or beside


def test_conditions_are_evaluated_and_written_as_python_has_them():
    guard = ["Equality", ["Mul", 2, ["FloorDiv", "h", 2]], ["Add", "h", ["Mod", "w", 3]]]
    for h in range(2, 12):
        for w in range(2, 12):
            assert holds(guard, {"h": h, "w": w}) == (2 * (h // 2) == h + w % 3)
    text = written(guard, {"h": "x.shape[2]", "w": "x.shape[3]"})
    assert text == "(2 * (x.shape[2] // 2)) == (x.shape[2] + (x.shape[3] % 3))"
    assert not holds(["Equality", ["Mod", "h", ["Add", "h", -5]], 0], {"h": 5})
    assert holds(["GreaterThan", "h", 2], {"h": 1})  # a size of 1 counts as 2
