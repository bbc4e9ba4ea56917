"""Attention against its formula, votes against counting, and all phases on a small network."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.coupling import Coupling, trace
from sparseworks.models.zoo import CifarResNet
from sparseworks.weights.structured.group_distillation import (
    GroupDistillation,
    attention,
    attention_loss,
)
from sparseworks.weights.structured.percentiles import (
    group_keep,
    loss_curves,
    percentiles_by_loss,
    percentiles_for,
)
from sparseworks.weights.structured.recovery import finetune
from sparseworks.weights.structured.scales import find_scales

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4
STAGES = ("layer1", "layer2", "layer3")
INNER = ("bn1", "layer*.bn2")


def resnet(seed: int = 0) -> CifarResNet:
    torch.manual_seed(seed)
    model = CifarResNet(1, 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.0)
    return model.eval()


@functools.cache
def coupled() -> Coupling:
    return trace(resnet(), X)


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    return [(X, Y)]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 8.0))
def test_attention_loss_is_its_formula(seed: int, t: float) -> None:
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 3, 4, 2, generator=g), torch.randn(2, 7, 4, 2, generator=g)
    total = 0.0
    for b in range(2):
        a_s = [sum(abs(float(student[b, c, i, j])) for c in range(3))
               for i in range(4) for j in range(2)]  # fmt: skip
        a_t = [sum(abs(float(teacher[b, c, i, j])) for c in range(7))
               for i in range(4) for j in range(2)]  # fmt: skip
        z_s, z_t = (sum(math.exp(v / t) for v in a) for a in (a_s, a_t))
        for s, q in zip(a_s, a_t):
            p = math.exp(q / t) / z_t
            total += p * (math.log(p) - (s / t - math.log(z_s)))
    assert float(attention_loss(student, teacher, t)) == pytest.approx(t * t * total / 2, rel=1e-4)
    assert attention(student).shape == (2, 8)
    assert float(attention_loss(student, student, t)) == pytest.approx(0, abs=1e-5)


def test_attention_needs_the_same_positions() -> None:
    with pytest.raises(ModelError, match="same positions"):
        attention_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2))


@settings(max_examples=15, deadline=None)
@given(st.tuples(*[st.floats(0, 0.9)] * 3), st.integers(0, 1000))
def test_every_group_has_its_own_threshold(percentiles: tuple[float, ...], seed: int) -> None:
    model = resnet(seed)
    scales = find_scales(model, coupled(), INNER)
    keep = group_keep(coupled(), scales, STAGES, percentiles)
    for s, p, stage in zip(scales, percentiles, (model.layer1, model.layer2, model.layer3)):
        gamma = stage[0].bn1.weight.detach().abs()
        ranked = sorted(gamma.tolist())
        line = ranked[int(p * len(gamma))] if p > 0 else 0.0
        expected = [v > line for v in gamma.tolist()]
        if not any(expected):  # one stays in any case
            expected = [v == ranked[-1] for v in gamma.tolist()]
        assert keep[s.family.roots].tolist() == expected


@pytest.mark.parametrize("votes", ["half", "any", "all"])
def test_norms_of_a_stream_vote(votes: str) -> None:
    model = resnet()
    scales = find_scales(model, coupled())
    keep = group_keep(coupled(), scales, ("bn1", *STAGES), (0.5,) * 4, votes)  # type: ignore[arg-type]
    lines = {}
    for name, norms in {
        "bn1": [model.bn1], "layer1": [model.layer1[0].bn1, model.layer1[0].bn2],
        "layer2": [model.layer2[0].bn1, model.layer2[0].bn2],
        "layer3": [model.layer3[0].bn1, model.layer3[0].bn2],
    }.items():  # fmt: skip
        every = torch.cat([n.weight.detach().abs() for n in norms]).sort().values
        lines[name] = float(every[len(every) // 2])
    stream = next(s for s in scales if "bn1.weight" in s.entries)
    shift = {"bn1": 0, "layer1": 0, "layer2": 8, "layer3": 24}  # zero channels come in before
    found = []
    for c in range(16):
        wants = [
            float(n.weight[c + shift[name]].detach().abs()) > lines[name]
            for name, n in (
                ("bn1", model.bn1), ("layer1", model.layer1[0].bn2),
                ("layer2", model.layer2[0].bn2), ("layer3", model.layer3[0].bn2),
            )
        ]  # fmt: skip
        found.append(sum(wants) >= {"half": 2, "any": 1, "all": 4}[votes])
    if not any(found):
        found[int(stream.mean().argmax())] = True
    assert keep[stream.family.roots].tolist() == found


def test_percentiles_meet_a_budget_with_the_least_cut() -> None:
    model = resnet()
    scales = find_scales(model, coupled(), INNER)
    choose = functools.partial(group_keep, coupled(), scales, STAGES)
    goal = 0.6 * coupled().flops()
    found = percentiles_for((1.0, 2.0, 4.0), choose, coupled().flops, goal)
    assert found[1] == pytest.approx(2 * found[0])
    assert coupled().flops(choose(found)) <= goal
    less = tuple(min(0.95, 0.98 * p) if p < 0.95 else p for p in found)
    assert coupled().flops(choose(less)) > goal - 0.1 * coupled().flops()
    with pytest.raises(InvalidArgument, match="not reached"):
        percentiles_for((1.0, 1.0, 1.0), choose, coupled().flops, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
def test_percentiles_by_loss_bear_alike(seed: int, share: float) -> None:
    """Against a scan of d in small steps; sizes stand for what a cut leaves."""
    g = torch.Generator().manual_seed(seed)
    grid, sizes = (0.0, 0.2, 0.5, 0.9), (100.0, 300.0, 50.0)
    curves = [
        [(0.0, 0.0), *zip(grid[1:], (10 * torch.rand(3, generator=g) - 1).tolist())] for _ in sizes
    ]
    left = lambda p: sum(n * (1 - x) for n, x in zip(sizes, p))  # noqa: E731
    goal = left((0.9,) * 3) + share * (450 - left((0.9,) * 3))
    found = percentiles_by_loss(curves, lambda p: p, left, goal)  # type: ignore[arg-type]

    def loss(curve: list[tuple[float, float]], p: float) -> float:
        """The largest loss on the way to p."""
        return float(max(np.interp([p, *(q for q in grid if q < p)], *zip(*curve))))

    assert left(found) <= goal + 1e-6
    worst = max(loss(c, p) for c, p in zip(curves, found))
    for curve, p in zip(curves, found):
        assert p == pytest.approx(0.9) or loss(curve, min(0.9, p + 0.02)) > worst - 1e-3
    if worst > 1e-3:  # a little less loss does not meet the goal
        less = [
            max((q / 1000 for q in range(901) if loss(c, q / 1000) <= worst - 1e-3), default=0.0)
            for c in curves
        ]
        assert left(less) > goal - 1.0


def test_loss_curves_cut_one_group_at_a_time() -> None:
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    scales = find_scales(model, coupled(), INNER)
    quality = lambda m: -float(sum(p.numel() for p in m.parameters()))  # noqa: E731
    curves = loss_curves(model, X, coupled(), scales, STAGES, quality, (0.25, 0.5))
    for curve, width, inputs in zip(curves, (16, 32, 64), (16, 16, 32)):
        one = 9 * (inputs + width) + 2  # two kernels and the scale and bias of a channel
        expected = [(0.0, 0), (0.25, -(width // 4 + 1) * one), (0.5, -(width // 2 + 1) * one)]
        assert [(p, loss) for p, loss in curve] == expected
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


def test_a_budget_beyond_the_curves_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="last point"):
        percentiles_by_loss(
            [[(0.0, 0.0), (0.5, 1.0)]],
            lambda p: p,
            lambda p: 1 - p[0],
            0.4,  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("schedule", ["half", "linear", "constant"])
def test_the_penalty_never_grows(schedule: str) -> None:
    method = GroupDistillation(strength=2.0, schedule=schedule)  # type: ignore[arg-type]
    values = [method.strength_at(t, 10) for t in range(10)]
    assert values[0] == 2.0 and values == sorted(values, reverse=True)
    expected = {"half": 10.1, "linear": 11.0, "constant": 20.0}
    assert sum(values) == pytest.approx(expected[schedule])


def test_without_weights_distillation_is_fine_tuning() -> None:
    one, two = resnet(), resnet()
    method = GroupDistillation(feature=0.0, classes=0.0)
    method.distil(one, resnet(1), batches, epochs=2, steps_per_epoch=1, lr=0.01)
    finetune(two, batches, epochs=2, steps_per_epoch=1, lr=0.01)
    for a, b in zip(one.state_dict().values(), two.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_loss_of_the_task_is_used_in_every_phase() -> None:
    def task(model: nn.Module, batch: tuple[Tensor, Tensor], logits: Tensor) -> Tensor:
        seen.append(model)
        return logits.square().mean()

    seen: list[nn.Module] = []
    one, two = resnet(), resnet()
    method = GroupDistillation(
        groups=STAGES, percentiles=0.0, strength=0.0, feature=0.0, classes=0.0
    )
    method.fit(one, X, batches, epochs=(1, 1, 1), steps_per_epoch=1, loss=task)
    assert seen == [one] * 3
    for _ in range(3):
        finetune(two, batches, epochs=1, steps_per_epoch=1, lr=method.lr, loss=task)
    for a, b in zip(one.state_dict().values(), two.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-5)


def test_attention_comes_nearer_to_the_teacher() -> None:
    student, teacher = resnet(), resnet(3)

    def distance() -> float:
        total = 0.0
        for stage in (1, 2):
            parts = [
                nn.Sequential(m.conv1, m.bn1, nn.ReLU(), m.layer1, m.layer2)[: 3 + stage].eval()
                for m in (student, teacher)
            ]
            with torch.no_grad():
                total += float(attention_loss(parts[0](X), parts[1](X)))
        return total

    before = distance()
    method = GroupDistillation(groups=("layer1", "layer2"), feature=1.0, classes=0.0)
    method.distil(student, teacher, batches, epochs=20, steps_per_epoch=1, lr=0.01)
    assert distance() < 0.7 * before
    assert not student.layer1._forward_hooks and not teacher.layer1._forward_hooks


def test_all_phases_run_and_the_teacher_is_the_dense_model() -> None:
    model = resnet()
    method = GroupDistillation(groups=STAGES, percentiles=(0.0, 0.25, 0.5), exclude=INNER)
    fitted = method.fit(model, X, batches, epochs=(1, 1, 1), steps_per_epoch=1)
    assert fitted.widths == {
        "layer1.0.bn1.weight": (16, 16),
        "layer2.0.bn1.weight": (32, 23),
        "layer3.0.bn1.weight": (64, 31),
    }
    assert model(X).shape == (8, 4) and model.layer3[0].conv2.weight.shape == (64, 31, 3, 3)


def test_what_cannot_be_done_changes_nothing() -> None:
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidArgument, match="one in"):
        GroupDistillation(groups=STAGES, percentiles=(0.5,)).fit(
            model, X, batches, epochs=(1, 1, 1), steps_per_epoch=1
        )
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
