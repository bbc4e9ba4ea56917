"""Four processes with experts spread over them train as data parallelism does, to the last bit; the
planner against exhaustive search, laws of plans, and what the simulator adds up."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparseworks.core.errors import InvalidArgument
from sparseworks.experts.hecate_costs import Cluster, drifting_loads, simulate
from sparseworks.experts.hecate_plan import (
    copies_of,
    even_dispatch,
    forecast,
    homes,
    materialize,
    reshard,
    route,
)

WORKER = Path(__file__).with_name("hecate_worker.py")
sys.path.insert(0, str(WORKER.parent))

from hecate_worker import SIZE, STEPS, averaged, loss_of, mixture  # noqa: E402

gloo = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without torch.distributed"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hecate")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    done = subprocess.run(
        [*launch, str(WORKER), str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{i}.pt", weights_only=True) for i in range(SIZE)]


@pytest.fixture(scope="module")
def alone(one_thread):
    """Plain mixtures, the gradients of four shards averaged."""
    model, _ = mixture("upcycling")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(STEPS):
        grads = []
        for rank in range(SIZE):
            model.zero_grad()
            loss_of(model.train(), step, rank).backward()
            grads.append([p.grad for p in model.parameters()])
        for p, parts in zip(model.parameters(), zip(*grads)):
            p.grad = averaged(list(parts))
        optimizer.step()
    return model.state_dict()


@gloo
@pytest.mark.parametrize("plan", ["random", "kept", "forecast"])
def test_weights_are_those_of_data_parallelism_to_the_last_bit(plan, ranks, alone):
    for seen in ranks:
        assert seen[plan]["state"].keys() == alone.keys()
        for name, wanted in alone.items():
            assert torch.equal(seen[plan]["state"][name], wanted), name
        assert seen[plan]["held"] == [n // SIZE for n in _sizes(alone)]
    assert sum(ranks[0][plan]["copies"]) > 0


def _sizes(state):
    found: dict[str, int] = {}
    for name, t in state.items():
        if ".experts." in name:
            found[name.split(".")[0]] = found.get(name.split(".")[0], 0) + t.numel()
    return list(found.values())


@gloo
def test_sums_in_the_type_of_the_weights_are_near(ranks, alone):
    for name, wanted in alone.items():
        assert torch.allclose(ranks[0]["rounded"]["state"][name], wanted, atol=1e-5), name


@gloo
@pytest.mark.parametrize(("plan", "gathers", "width"), [("random", 2, 8), ("kept", 1, 8),
                                                         ("rounded", 2, 4)])  # fmt: skip
def test_bytes_are_copies_times_the_size_of_an_expert(plan, gathers, width, ranks):
    for seen in (r[plan] for r in ranks):
        for layer in (0, 1):
            moved = sum(
                c * s for c, s in zip(seen["copies"][layer::2], seen["sizes"][layer::2])
            )  # fmt: skip
            assert seen["bytes"][layer] == (gathers * 4 * moved, width * moved)


def burden(tokens, placement):
    return float(even_dispatch(tokens, placement).sum((0, 1)).max())


def test_plans_are_never_below_the_best_and_near_it():
    """All placements of 4 experts on 3 devices within the slots."""
    ratios = []
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        home = torch.zeros(4, 3, dtype=torch.bool)
        home[torch.arange(4), torch.tensor([0, 1, 2, 0])] = True
        tokens = torch.rand(4, generator=g).pow(3).expand(3, 4) + 0.01
        found = materialize(home, tokens.sum(0), overlap=4, slots=1)
        assert bool((found & home).eq(home).all()) and int((found & ~home).sum(0).max()) <= 1
        best = min(
            burden(tokens, home | torch.stack([torch.arange(4) == c for c in choice], 1))
            for choice in itertools.product(range(-1, 4), repeat=3)
        )
        ratios.append(burden(tokens, found) / best)
    assert min(ratios) >= 1 - 1e-12
    assert sum(ratios) / len(ratios) < 1.35


@pytest.mark.parametrize(("overlap", "slots"), [(0, 2), (2, 4), (8, 2), (8, 1), (32, 3)])
@pytest.mark.parametrize("per_node", [None, 4])
def test_laws_of_plans(overlap, slots, per_node):
    g = torch.Generator().manual_seed(overlap * 10 + slots)
    home, load = homes(32, 8), torch.rand(32, generator=g).pow(4)
    found = materialize(home, load, overlap=overlap, slots=slots, per_node=per_node)
    added = found & ~home
    assert bool((found & home).eq(home).all()) and int(added.sum(0).max()) <= slots
    most = set(load.argsort(descending=True)[:overlap].tolist())
    assert set(added.any(1).nonzero().squeeze(1).tolist()) <= most
    tokens = torch.randint(0, 50, (8, 32), generator=g).double()
    sent = even_dispatch(tokens, found, per_node)
    assert torch.allclose(sent.sum(2), tokens)
    assert not bool(sent.sum(0)[~found].any())
    to = route(found, per_node)
    for s, e in itertools.product(range(8), range(32)):
        assert bool(found[e, to[s, e]]) and (not found[e, s] or to[s, e] == s)
        near = [d for d in found[e].nonzero().squeeze(1).tolist() if d // 4 == s // 4]
        if per_node and near:
            assert int(to[s, e]) // 4 == s // 4
            assert float(sent[s, e].view(2, 4).sum(1)[1 - s // 4]) == 0


def test_copies_are_shared_out_in_proportion():
    load = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert copies_of(load, 3, 7, 7).tolist() == [4, 2, 1, 0, 0]
    assert copies_of(load, 3, 100, 3).tolist() == [3, 3, 3, 0, 0]
    assert copies_of(load, 2, 5, 3).tolist() == [3, 2, 0, 0, 0]
    assert int(copies_of(torch.zeros(4, dtype=torch.float64), 2, 5, 3).sum()) == 0


def test_forecasts_and_homes():
    past = [torch.tensor([float(i), 1.0]) for i in range(8)]
    assert forecast(past).tolist() == [5.0, 1.0]
    assert homes(4, 2).tolist() == [[True, False]] * 2 + [[False, True]] * 2
    for wrong in (lambda: homes(5, 2), lambda: forecast([]), lambda: materialize(
        torch.ones(2, 2, dtype=torch.bool), torch.ones(2), overlap=1, slots=1)):  # fmt: skip
        with pytest.raises(InvalidArgument):
            wrong()


def test_new_homes_fill_every_place_and_even_the_load_out():
    loads = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).pow(4)
    found = reshard(loads, 8, overlap=2, per_node=4)
    assert bool((found.sum(2) == 1).all()) and bool((found.sum((0, 1)) == 6).all())
    rest = loads.clone()
    rest.scatter_(1, loads.argsort(1, descending=True)[:, :2], 0.0)
    heavy = (found * rest[..., None]).sum((0, 1))
    plain = (homes(16, 8) * rest[..., None]).sum((0, 1))
    assert float(heavy.max()) < float(plain.max())


def test_costs_of_a_step_by_hand():
    """Two nodes of one device, two experts, all tokens for the first."""
    cluster = Cluster(
        2, 1, between=100.0, inside=1e9, seconds_per_token=0.5, token_bytes=10.0,
        expert_bytes=300.0, state=2.0, rounds=4, hidden=1.0,
    )  # fmt: skip
    loads = torch.tensor([[8.0, 0.0]]).repeat(6, 1)
    ep = simulate(cluster, loads, "ep")
    assert (ep.compute, ep.exposed, ep.imbalance, ep.copies) == (4.0, 0.0, 2.0, 0.0)
    assert ep.exchange == pytest.approx(4 * 4 * 10 / 100)
    one = simulate(cluster, loads, "fssdp", overlap=1, slots=1)
    assert (one.compute, one.exchange, one.imbalance, one.copies) == (2.0, 0.0, 1.0, 1.0)
    assert one.exposed == pytest.approx(3 * (300 / 100 - 1))
    assert one.seconds == pytest.approx(one.compute + one.exchange + one.exposed)
    every = simulate(cluster, loads, "replicate")
    assert every.copies == 2 and every.exposed == pytest.approx(one.exposed)
    assert cluster.overlap == 0
    with pytest.raises(InvalidArgument, match="only fill"):
        simulate(cluster, loads[:5], "ep")


def test_a_chain_of_copies_sends_once_a_device():
    cluster = Cluster(2, 4, between=1.0, inside=10.0, expert_bytes=20.0)
    home = homes(8, 8)
    after = home.clone()
    after[0] = True
    # the last device of the home's node sends across, 20 s; what it takes comes in 2 s meanwhile
    assert cluster.copying_seconds(home, after) == pytest.approx(20.0)
    after[0, 5:] = False
    assert cluster.copying_seconds(home, after, 2.0) == pytest.approx(40.0)
    after[0, 4] = False
    assert cluster.copying_seconds(home, after) == pytest.approx(2.0)
    assert cluster.copying_seconds(home, home) == 0


def test_loads_are_tokens():
    found = drifting_loads(8, 1000, 20, 1.2, torch.Generator().manual_seed(0))
    assert found.shape == (20, 8) and bool((found.sum(1) == 1000).all())
    assert float(found.double().mean(0).max()) > 200
