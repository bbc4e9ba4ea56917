"""Signatures in masks: exact when written, quiet elsewhere, their chance an exact tail; keys by
random walks, with the visits that the weights say."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, hypergeom
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import CheckpointError, InvalidArgument, ModelError
from sparseworks.core.masks import Masks
from sparseworks.weights.tickets.keys import joined, matched_split, split, walk
from sparseworks.weights.tickets.signatures import Code, Place, embed, extract, kernels, verify
from sparseworks.weights.tickets.triggers import Triggers


def record_of(shapes, density, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Masks.of({f"c{i}.weight": torch.rand(s, generator=g) < density for i, s in shapes}, "t")


def agreement(mask, code, row, column):
    """Plain loops."""
    right = 0
    for a in range(code.size):
        for b in range(code.size):
            if code.data[a, b]:
                full = any(bool(v) for v in mask[row + a, column + b].flatten())
                right += full == bool(code.bits[a, b])
    return right


@given(
    st.integers(2, 7), st.floats(0.02, 0.6), st.integers(0, 10_000), st.integers(0, 3),
    st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_code_reads_back_and_nothing_else_changes(size, density, seed, more, wide):
    code = Code.of_text(f"owner {seed}", size)
    shapes = [(0, (size + more, size + wide, 2, 2)), (1, (size + 1, size, 3, 3)), (2, (3, 9))]
    record = record_of(shapes, density, seed)
    done = embed(record, code, seed=seed)
    assert torch.equal(extract(done.masks[done.place.name], done.place, size), code.bits)
    assert verify(dict(done.masks), code, done.place).errors == 0
    best = max(
        agreement(record[n], code, r, c)
        for n in ("c0.weight", "c1.weight")
        for r in range(record[n].shape[0] - size + 1)
        for c in range(record[n].shape[1] - size + 1)
    )
    mask = record[done.place.name]
    assert agreement(mask, code, done.place.row, done.place.column) == best
    outside = torch.ones(mask.shape[:2], dtype=torch.bool)
    done.place.window(outside, size)[:] = False
    for name in record:
        after = done.masks[name]
        where = outside if name == done.place.name else slice(None)
        assert torch.equal(after[where], record[name][where])
    changed = sum(int((record[n] ^ done.masks[n]).sum()) for n in record)
    assert changed == done.changed
    fewer = sum(int(record[n].sum()) - int(done.masks[n].sum()) for n in record)
    assert done.lost == max(0, fewer)
    if done.lost:  # then no kernel that may take more has room
        room = place_room(record, done, code)
        assert room == 0


def place_room(record, done, code):
    window = done.place.window(done.masks[done.place.name], code.size)
    before = kernels(done.place.window(record[done.place.name], code.size))
    return int((~window[code.bits & before]).sum())


def test_the_patterns_of_a_qr_code_stay_as_they_are():
    g = torch.Generator().manual_seed(3)
    code = Code.of_qr(torch.rand(29, 29, generator=g) < 0.5)
    assert int(code.data.sum()) == 551
    record = record_of([(0, (32, 32, 3, 3))], 0.1)
    done = embed(record, code)
    before = done.place.window(record["c0.weight"], 29)[~code.data]
    assert torch.equal(done.place.window(done.masks["c0.weight"], 29)[~code.data], before)
    assert verify(dict(done.masks), code, done.place).modules == 551


def test_chance_is_the_hypergeometric_tail():
    code = Code.of_text("me", 5)
    for seed in range(6):
        weight = record_of([(0, (6, 7, 2, 2))], 0.2, seed)["c0.weight"]
        verdict = verify(
            {"c0.weight": weight, "bias": torch.ones(9)}, code, Place("c0.weight", 1, 2)
        )
        read = kernels(weight)[1:6, 2:7]
        hits = int((read & code.bits).sum())
        tail = hypergeom.sf(hits - 1, 25, int(code.bits.sum()), int(read.sum()))
        assert verdict.chance == pytest.approx(min(1.0, 2 * 3 * tail))
        assert verdict.errors == int((read != code.bits).sum())


def test_other_owners_read_noise():
    record = record_of([(0, (64, 64, 3, 3))], 0.1)
    done = embed(record, Code.of_text("owner"))
    assert verify(dict(done.masks), Code.of_text("owner"), done.place).chance < 1e-100
    rates = [
        verify(dict(done.masks), Code.of_text(f"thief {i}"), done.place).error_rate
        for i in range(20)
    ]
    assert abs(sum(rates) / 20 - 0.5) < 0.02
    assert min(rates) > 0.4


def test_codes_are_bits_of_their_text():
    assert torch.equal(Code.of_text("a", 9).bits, Code.of_text("a", 9).bits)
    assert not torch.equal(Code.of_text("a", 9).bits, Code.of_text("b", 9).bits)
    assert abs(float(Code.of_text("a", 99).bits.float().mean()) - 0.5) < 0.02


def test_walks_visit_kernels_as_often_as_the_weights_say():
    g = torch.Generator().manual_seed(0)
    first, second = torch.rand(4, 3, generator=g), torch.rand(5, 6, generator=g)
    second[:, 1] = 0  # a channel without kernels: drawn again
    walks = 40_000
    visited = walk([first, second], walks, g)
    start = torch.full((3,), 1 / 3)
    p1 = first / first.sum(0) * start  # [out, in]
    reach = torch.zeros(6)
    reach[:4] = p1.sum(1)
    alive = [0, 2, 3, 4, 5]
    lost = float(reach[1])
    reach[1] = 0
    reach[alive] += lost / 5
    p2 = second / second.sum(0).clamp_min(1e-9) * reach
    for steps, wanted in zip(visited, (p1, p2)):
        counts = torch.zeros(wanted.shape)
        counts.index_put_((steps[:, 0], steps[:, 1]), torch.ones(walks), accumulate=True)
        error = (wanted * (1 - wanted) / walks).sqrt()
        assert bool(((counts / walks - wanted).abs() <= 5 * error + 1e-9).all())


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 9, 3, padding=1), nn.ReLU(),
        nn.Conv2d(9, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 3),
    )  # fmt: skip


def test_a_key_and_the_rest_are_the_ticket():
    model = convnet()
    record = sw.prune(model, "magnitude", sparsity=0.6, include="*").masks
    parts = split(model, record, walks=20)
    whole = joined(parts)
    control = matched_split(record, parts.key)
    assert 0 < parts.withheld == control.withheld
    for name in record:
        assert torch.equal(whole[name], record[name])
    for name in parts.key:
        assert not bool((parts.key[name] & parts.released[name]).any())
        full = kernels(parts.key[name])
        assert torch.equal(parts.key[name][full], record[name][full])  # whole kernels
        assert int(full.sum()) == int(kernels(control.key[name]).sum())
    assert torch.equal(parts.released["7.weight"], record["7.weight"])  # only convolutions
    assert split(model, record, walks=200).withheld > parts.withheld


def data(seed, count=4):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 2, 4, 4, generator=g), torch.randint(0, 3, (8,), generator=g))
        for _ in range(count)
    ]


def fit(model, *, start, seed, first_step):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    start(model, optimizer, 4)
    for x, y in data(seed):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_a_marked_ticket_is_trained_and_proven(tmp_path):
    from sparseworks.weights.tickets.ownership import Certificate

    model = convnet()
    ticket = sw.prune(model, "magnitude", sparsity=0.7, copy=True).masks
    path = tmp_path / "certificate.json"
    done = sw.experiment(
        fit, model, "ownership", owner="me, 2026", size=6, ticket=ticket, certificate=str(path),
        controls=True,
    )  # fmt: skip
    assert list(done.finished) == ["marked", "unmarked"]
    assert done.result.name == "marked" and done.figures["error rate"] == 0
    read = Certificate.load(path)
    assert read.owner == "me, 2026"
    assert read.verify(model).errors == 0  # after training, from the weights alone
    sw.attach(model, None)
    assert read.verify(model).errors == 0
    assert read.verify(done.finished["unmarked"].into(convnet())).errors > 0
    assert read.verify(model).chance < 1e-3


def test_the_key_scheme_trains_the_released_part():
    model = convnet()
    ticket = sw.prune(model, "magnitude", sparsity=0.5, copy=True).masks
    parts = split(model, ticket, walks=10)
    done = sw.experiment(
        fit, model, "ownership", owner="me", scheme="key", walks=10, ticket=ticket, controls=True,
    )  # fmt: skip
    assert list(done.finished) == ["released", "without random kernels", "whole"]
    record = sw.masks(model)
    assert all(torch.equal(record[n], parts.released[n]) for n in record)
    assert done.figures["share of weights withheld"] == parts.withheld / sum(
        int(m.sum()) for m in ticket.values()
    )


def test_triggers_join_every_batch_and_count_as_guesses_would():
    images = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    triggers = Triggers.of_owner(images, 3, "me")
    seen = list(triggers.mixed(data(0, 14)))
    for i, ((x, y), (plain, labels)) in enumerate(zip(seen, data(0, 14))):
        assert torch.equal(x[:-1], plain) and torch.equal(y[:-1], labels)
        assert torch.equal(x[-1], images[i % 12]) and y[-1] == triggers.labels[i % 12]
    model = convnet().train()
    share, chance = triggers.verify(model)
    hits = int((model(images).argmax(1) == triggers.labels).sum())
    assert share == hits / 12 and model.training
    assert chance == pytest.approx(binom.sf(hits - 1, 12, 1 / 3))
    other = Triggers.of_owner(images, 3, "you")
    assert not torch.equal(other.labels, triggers.labels)
    with pytest.raises(InvalidArgument, match="labels"):
        Triggers(images, triggers.labels[:3], 3)


def test_misuse_is_refused(tmp_path):
    from sparseworks.weights.tickets.ownership import Certificate

    code = Code.of_text("me", 6)
    with pytest.raises(ModelError, match="smaller size"):
        embed(record_of([(0, (5, 9, 3, 3))], 0.5), code)
    with pytest.raises(InvalidArgument, match="no mask"):
        embed(record_of([(0, (9, 9, 3, 3))], 0.5), code, names=["other"])
    with pytest.raises(InvalidArgument, match="not inside"):
        extract(torch.ones(9, 9, 3, 3), Place("c0.weight", 4, 0), 6)
    with pytest.raises(ModelError, match="no weight"):
        verify({}, code, Place("c0.weight", 0, 0))
    with pytest.raises(InvalidArgument, match="29 x 29"):
        Code.of_qr(torch.ones(21, 21))
    with pytest.raises(InvalidArgument, match="give `owner`"):
        sw.experiment(fit, convnet(), "ownership")
    for options in (
        {"owner": "me", "scheme": "seal"},
        {"owner": "me", "walks": 0},
        {"owner": "me", "scheme": "key", "certificate": "x.json"},
    ):
        with pytest.raises(InvalidArgument, match="ownership"):
            sw.methods.Ownership(**options)
    with pytest.raises(InvalidArgument, match="ticket"):
        sw.experiment(fit, convnet(), "ownership", owner="me")
    broken = tmp_path / "certificate.json"
    broken.write_text(json.dumps({"owner": "me"}))
    with pytest.raises(CheckpointError, match="certificate"):
        Certificate.load(broken)
