"""Latency budgets are met, and multiples of widths are those that the machine rewards.

The clock is replaced by a model of a machine, so that nothing depends on how busy this one is.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.models.coupling import Coupling, trace
from sparseworks.weights.structured import slimming, targets
from sparseworks.weights.structured.selection import ladders, search

X = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 4)]
    return nn.Sequential(*layers).eval()


def machine(lanes: int):  # type: ignore[no-untyped-def]
    """Seconds of a machine that computes `lanes` channels at once, used or not."""

    def seconds(model: nn.Module, example: object, repeats: int = 7) -> float:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        return 1e-3 + sum(
            1e-9 * m.in_features * math.ceil(m.out_features / lanes) * lanes for m in linear
        )

    return seconds


def use(monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    monkeypatch.setattr(targets, "latency", machine(lanes))
    monkeypatch.setattr(slimming, "measure_latency", machine(lanes))


@pytest.mark.parametrize("lanes", [1, 8, 16])
@pytest.mark.parametrize("share", [0.995, 0.9945, 0.993])
def test_a_latency_budget_is_met_and_reported(
    monkeypatch: pytest.MonkeyPatch, lanes: int, share: float
) -> None:
    use(monkeypatch, lanes)
    before = machine(lanes)(net(), X)
    result = sw.slim(net(), X, latency=share, iterations=2)
    assert result.latency == (before, machine(lanes)(result.model, X))
    assert result.latency[1] <= share * before
    assert result.model(X).shape == (2, 4)


def test_of_models_as_fast_the_one_that_keeps_most_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, 16)
    kept = {}
    for multiple in (1, 8, 16, None):
        result = sw.slim(net(), X, latency=0.995, round_to=multiple)
        kept[multiple] = result.flops[1]
    assert kept[None] == max(kept.values())


def test_auto_takes_the_fastest_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 16)
    times = {}
    for multiple in (1, 8, 16, "auto"):
        result = sw.slim(net(), X, flops=0.5, round_to=multiple)
        times[multiple] = machine(16)(result.model, X)
        assert result.flops[1] <= 0.5 * result.flops[0]
    assert times["auto"] == min(times.values()) < times[1]
    chosen = sw.slim(net(), X, flops=0.5, round_to="auto")
    multiple = chosen.options["round_to"]
    assert multiple in (8, 16) and all(w.after % multiple == 0 for w in chosen.widths)


def test_scores_are_computed_once_for_all_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 8)
    from sparseworks.weights.structured.scores import GroupNorm

    calls = []
    plain = GroupNorm.score
    monkeypatch.setattr(GroupNorm, "score", lambda *a: calls.append(1) or plain(*a))
    sw.slim(net(), X, flops=0.5, round_to="auto")
    assert len(calls) == 1


def test_what_cannot_be_reached_with_any_multiple_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, 8)
    model = net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidArgument, match="latency cannot fall"):
        sw.slim(model, X, latency=0.5)
    with pytest.raises(InvalidArgument, match="round_to="):
        sw.slim(model, X, flops=0.5, round_to=0)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_layers_have_multiples_of_their_own() -> None:
    result = sw.slim(net(), X, flops=0.5, round_to={"0": 16, "*": 8}, floor=0.0)
    after = {w.name: w.after for w in result.widths}
    assert after and all(w % (16 if name.startswith("0.") else 8) == 0 for name, w in after.items())
    free = sw.slim(net(), X, flops=0.5, round_to={"2": 16}, exclude="4")  # fits, and is not cut
    same = sw.slim(net(), X, flops=0.5, exclude="4")
    assert [w.after for w in free.widths] == [w.after for w in same.widths]


def test_a_pattern_of_multiples_that_fits_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'layer9' matches no parameter"):
        sw.slim(net(), X, flops=0.5, round_to={"layer9": 8})
    with pytest.raises(InvalidArgument, match="round_to="):
        sw.slim(net(), X, flops=0.5, round_to={"0": 0})


def test_what_goes_together_competes_by_its_mean() -> None:
    """Two layers of two pairs: the least single score lies in a pair that is worth more."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    coupling = trace(model, torch.randn(3, 2))
    first, second = coupling.families
    scores = np.ones(coupling.keep_all().shape)
    scores[first.roots] = [0.1, 1.3, 2.0, 2.0]
    scores[second.roots] = [0.6, 0.6, 2.0, 2.0]
    for multiple, least in ((1, first), (2, second)):
        made = ladders(
            coupling, coupling.families, scores, normalise=None, shared={}, round_to=multiple,
            floor=0.0,
        )  # fmt: skip
        keep = search(coupling, made, lambda k: float(k.sum()), keep_all(coupling) - 1.0, "groups")
        gone = np.flatnonzero(~keep)
        assert set(gone) <= set(least.roots) and len(gone) == multiple


def keep_all(coupling: Coupling) -> float:
    return float(coupling.keep_all().sum())
