"""The low-rank + sparse layer against autograd through the dense weight, and what it holds."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.weights.lowrank.factoring import factored, memory_of, merge
from sparseworks.weights.lowrank.layers import SparseLowRankLinear, random_support
from sparseworks.weights.lowrank.product import blocks_of, sparse_low_rank


def case(tokens, out, width, rank, count, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    places = random_support(out * width, count, g)
    made = [torch.randn(s, generator=g, dtype=dtype).requires_grad_()
            for s in ((tokens, width), (out, rank), (rank, width), (count,))]  # fmt: skip
    return made, places, torch.randn(tokens, out, generator=g, dtype=dtype)


def dense(x, up, down, values, places):
    sparse = torch.zeros(len(up) * down.shape[1], dtype=x.dtype).index_put((places,), values)
    return x @ (up @ down + sparse.view(len(up), -1)).t()


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9), out=st.integers(1, 13), width=st.integers(1, 11), data=st.data(),
)  # fmt: skip
def test_product_and_gradients_are_those_of_the_dense_weight(tokens, out, width, data):
    rank = data.draw(st.integers(1, min(out, width)))
    count = data.draw(st.integers(0, out * width))
    limit = data.draw(st.integers(1, 8 * out * width + 8))
    tensors, places, dy = case(tokens, out, width, rank, count)
    y = sparse_low_rank(*tensors, places.int(), limit)
    wanted = dense(*tensors, places)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(y, tensors, dy)
    for mine, theirs in zip(got, torch.autograd.grad(wanted, tensors, dy)):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens", [2, 50])  # products of the factors, and blocks that hold B A
@pytest.mark.parametrize("needed", range(4))
def test_each_gradient_alone(tokens, needed):
    tensors, places, dy = case(tokens, 12, 10, 3, 30)
    given_ = [t if i == needed else t.detach() for i, t in enumerate(tensors)]
    y = sparse_low_rank(*given_, places, limit=4 * 8 * 10)
    [got] = torch.autograd.grad(y, given_[needed], dy)
    [wanted] = torch.autograd.grad(dense(*tensors, places), tensors[needed], dy)
    torch.testing.assert_close(got, wanted)


def test_blocks_cover_every_value_once():
    places = random_support(7 * 5, 20, torch.Generator().manual_seed(1))
    seen = torch.zeros(7, 5)
    for rows, part, inside in blocks_of((7, 5), places, 4, limit=2 * 5 * 4):
        block = torch.zeros(rows.stop - rows.start, 5)
        block.view(-1)[inside] = 1.0 + torch.arange(20.0)[part]
        seen[rows] += block
    wanted = torch.zeros(35)
    wanted[places] = 1.0 + torch.arange(20.0)
    assert torch.equal(seen.view(-1), wanted)


def test_what_is_saved_for_the_backward_pass_and_the_peak():
    """No tensor as large as the weight is kept, and none is made when it exceeds a block."""
    from torch.profiler import ProfilerActivity, profile

    layer = SparseLowRankLinear(2048, 2048, 64, random_support(2048**2, 40_000, torch.Generator()))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.02)
    saved = []
    x = torch.randn(16, 2048, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, id):
        layer(x)
    assert max(saved) <= 64 * 2048
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        layer(x).sum().backward()
    sizes = [e.cpu_memory_usage for e in seen.events() if e.name == "[memory]"]
    assert max(sizes) <= 8 << 20 < 2048 * 2048 * 4


def test_memory_is_what_the_tensors_take():
    layer = SparseLowRankLinear(40, 24, 4, torch.arange(0, 960, 7), bias=True)
    told = layer.memory()
    stored = [*layer.parameters(), *layer.buffers()]
    assert told.total == sum(t.untyped_storage().nbytes() for t in stored)
    assert told.values == told.indices == 138 * 4 and told.factors == 4 * 64 * 4
    assert told.dense == (960 + 24) * 4 and told.trained == 138 + 256 + 24


@pytest.mark.parametrize("count", [0, 1, 500, 9000, 10_000])
def test_a_random_support_is_rising_without_repeats(count):
    places = random_support(10_000, count, torch.Generator().manual_seed(3))
    assert len(places) == count == len(set(places.tolist()))
    assert torch.equal(places, places.sort().values)
    assert not count or (places[0] >= 0 and places[-1] < 10_000)


def test_bad_places_and_ranks_are_refused():
    for places in (torch.tensor([3, 3]), torch.tensor([5, 2]), torch.tensor([-1]),
                   torch.tensor([12])):  # fmt: skip
        with pytest.raises(InvalidArgument, match="places of S"):
            SparseLowRankLinear(4, 3, 1, places)
    with pytest.raises(InvalidArgument, match="rank=4"):
        SparseLowRankLinear(4, 3, 4, torch.tensor([1]))
    layer = SparseLowRankLinear(4, 3, 1, torch.tensor([1]))
    with pytest.raises(ModelError, match="float64"):
        layer(torch.zeros(2, 4, dtype=torch.float64))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(),
                         nn.Linear(16, 5))  # fmt: skip


def trained(net, **options):
    job = sw.transform(net, "sltrain", rank=4, **{"sparsity": 0.9, **options})
    optimizer = torch.optim.AdamW(job.parameter_groups(), 0.01)
    job.attach(optimizer)
    for step in range(8):
        x = torch.randn(32, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return job, optimizer


@pytest.mark.parametrize("learned", [False, True])
def test_sltrain_steps_as_the_dense_formula_does(learned):
    """Plain fp64: W = B (s A) + S with autograd through the dense W, the same Adam."""
    net = model().double()
    job = sw.transform(net, "sltrain", rank=4, sparsity=0.9, learned_scale=learned, scale=0.5)
    layer = net[0]
    twin = [p.detach().clone().requires_grad_() for p in (layer.up, layer.down, layer.values)]
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    places, bias = layer.indices.long(), layer.bias.detach().clone()
    extra = ([layer.scale], [scale]) if learned else ([], [])
    mine = torch.optim.Adam([layer.up, layer.down, layer.values, *extra[0]], 0.01)
    theirs = torch.optim.Adam([*twin, *extra[1]], 0.01)
    for step in range(5):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        factor = torch.tanh(scale) if learned else scale.detach()
        outs = layer(x), dense(x, twin[0], twin[1] * factor, twin[2], places) + bias
        torch.testing.assert_close(*outs)
        for out, optimizer in zip(outs, (mine, theirs)):
            optimizer.zero_grad()
            out.sin().sum().backward()
            optimizer.step()
    assert job.current_sparsity == pytest.approx(0.9, abs=0.01)


def test_only_what_trains_has_optimizer_state_and_the_dense_weight_is_gone():
    import gc
    import weakref

    net = model()
    before = weakref.ref(net[0].weight)
    job, optimizer = trained(net)
    gc.collect()
    assert before() is None, "the replaced weight is still held"
    numbers = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.ndim)
    assert numbers == 2 * sum(p.numel() for p in net.parameters())
    told = memory_of(net)
    assert told.trained == sum(p.numel() for _, m in factored(net) for p in m.parameters())
    job.finish()


def test_what_finish_leaves_computes_the_same():
    x = torch.randn(7, 12)
    for after in ("parts", "merged", "factored"):
        net = model()
        job, _ = trained(net, after=after)
        wanted = net(x)
        record = job.finish()
        torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-6)
        if after == "parts":
            assert set(record) == {"0.sparse.weight", "2.sparse.weight"}
            assert record.violations(net) == {}
            fast = sw.compile(net, x)
            torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-5)
        if after == "merged":
            assert [type(m) for m in net][::2] == [nn.Linear] * 3
        if after == "factored":
            merge(net)
            torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-6)
            assert not list(factored(net))


def test_the_state_dict_and_the_files_lose_no_bit(tmp_path):
    net = model()
    trained(net, after="factored")[0].finish()
    kept = io.BytesIO()
    torch.save(net.state_dict(), kept)
    sw.save(net, tmp_path / "model.safetensors")
    for read in ("state", "file"):
        other = model()
        sw.transform(other, "sltrain", rank=4, sparsity=0.9, seed=1, after="factored").finish()
        if read == "state":
            other.load_state_dict(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
        else:
            sw.load(tmp_path / "model.safetensors", other)
        for name, value in net.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_starting_from_weights_keeps_what_a_matrix_of_that_form_can():
    net = model().double()
    weight = net[2].weight.detach().clone()
    sw.transform(net, "sltrain", rank=4, sparsity=0.5, start="weights", exclude="0")
    u, s, v = torch.linalg.svd(weight)
    low = u[:, :4] * s[:4] @ v[:4]
    got = net[2].weight_of()
    flat = (got - low).view(-1)
    places = net[2].indices.long()
    torch.testing.assert_close(flat[places], (weight - low).view(-1)[places])
    rest = torch.ones(320, dtype=torch.bool).index_fill(0, places, False)
    assert flat[rest].abs().max() < 1e-12


def test_full_rank_by_a_few_entries():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                        nn.Linear(64, 2))  # fmt: skip
    sw.transform(net, "sltrain", rank=8, density=0.1)
    with torch.no_grad():
        nn.init.normal_(net[0].up)
    assert torch.linalg.matrix_rank(net[0].weight_of()) > 60
    assert torch.linalg.matrix_rank(net[0].up @ net[0].down) == 8


def test_autocast_and_bf16():
    net = model()
    sw.transform(net, "sltrain", rank=4, sparsity=0.9)
    x = torch.randn(9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        loss = y.float().square().mean()
    loss.backward()
    assert y.dtype == torch.bfloat16 and net[0].values.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), net(x), rtol=0.1, atol=0.1)
    net.bfloat16()(x.bfloat16()).sum().backward()


def test_bad_options_change_nothing():
    for options, match in (
        ({"density": 1.0}, "density"), ({"rank": -1}, "rank"), ({"start": "zero"}, "start"),
        ({"after": "gone"}, "after"), ({"rank": 99}, "rank=99"),
    ):  # fmt: skip
        net = model()
        with pytest.raises(InvalidArgument, match=match):
            sw.transform(net, "sltrain", **options)
        assert [type(m) for m in net][::2] == [nn.Linear] * 3
    tied = model()
    tied[2] = nn.Linear(20, 20)
    tied.append(tied[2])
    tied[2].weight = tied[0].weight = nn.Parameter(torch.zeros(20, 20))
    with pytest.raises(ModelError, match="tied"):
        sw.transform(tied, "sltrain")
    with pytest.raises(ModelError, match="none that it may take"):
        sw.transform(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)), "sltrain")
