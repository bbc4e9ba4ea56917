"""Deltas through a stream against whole frames; gradients of steps by hand; whole clips only."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.activations.delta import multiplications, quantized
from sparseworks.activations.streaming import DeltaStream
from sparseworks.core.errors import InvalidArgument, ModelError

D = torch.float64


class Net(nn.Module):
    """Strides, padding, a residual sum, norms, pooling and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.third = nn.Conv2d(4, 6, 3, stride=2)
        self.fourth, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        y = F.relu(y + self.second(y))
        y = F.max_pool2d(F.relu(self.third(y)), 2).mean((2, 3))
        return self.last(F.relu(self.fourth(y)))


def net():
    torch.manual_seed(0)
    model = Net().double().eval()
    model.norm.running_mean.normal_()
    return model


def clips(count=3, frames=6):
    """Frames that differ in a few pixels."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 2, 9, 9, generator=g, dtype=D).repeat(1, frames, 1, 1, 1)
    x[:, :, :, 2:4, 2:4] += torch.randn(count, frames, 2, 2, 2, generator=g, dtype=D)
    return x


def test_a_stream_of_changes_is_the_model_on_quantised_frames():
    model, x = net(), clips()
    run = sw.sparse_activations(model, "delta", data=[x.flatten(0, 1)], frames=6, step=0.2)
    with torch.no_grad():
        wanted = model(x.flatten(0, 1)).unflatten(0, (3, 6))
        with DeltaStream(run) as stream:
            found = [model(x[:, t]) for t in range(6)]
            assert stream.share < 0.6 and stream.state_bytes > 0
            assert torch.equal(found[0], wanted[:, 0]), "the first frame is dense"
            assert torch.allclose(torch.stack(found, 1), wanted, atol=1e-10)
            stream.reset()
            assert stream.state_bytes == 0
            assert torch.equal(model(x[:, 4]), wanted[:, 4]), "exact after a reset"
            with pytest.raises(InvalidArgument, match="reset"):
                model(x[:2, 4])
        assert torch.equal(model(x.flatten(0, 1)).unflatten(0, (3, 6)), wanted)
        with DeltaStream(run, every=2) as stream:
            again = [model(x[:, t]) for t in range(5)]
            for t in (0, 2, 4):
                assert torch.equal(again[t], wanted[:, t])
    run.remove()


def test_the_counts_are_those_of_a_loop():
    model, x = net(), clips()
    run = sw.sparse_activations(model, "delta", data=[x.flatten(0, 1)], frames=6, step=0.3)
    run.reset()
    with torch.no_grad():
        model(x.flatten(0, 1))
    gate = run.gates["first"]
    levels = (x / 0.3).round()
    moved = sum(
        int((levels[c, t] != levels[c, t - 1]).sum()) for c in range(3) for t in range(1, 6)
    )
    assert (gate.passed, gate.seen) == (moved, 3 * 5 * 2 * 81)
    assert (gate.first_passed, gate.first_seen) == (int((levels[:, 0] != 0).sum()), 3 * 2 * 81)


def test_the_smallest_step_meets_the_share_of_zeros():
    model, x = net(), clips()
    run = sw.sparse_activations(model, "delta", data=[x.flatten(0, 1)], frames=6, sparsity=0.97)
    theta = run.gates["first"].theta[0].item()
    for factor, enough in ((1.0, True), (0.99, False)):
        levels = (x.float() / (theta * factor)).round()
        share = float((levels[:, 1:] == levels[:, :-1]).double().mean())
        assert (share >= 0.97) == enough


@pytest.mark.parametrize(("reverse", "task", "penalty"),
                         [("all", -1, -1), ("penalty", 1, -1), ("none", 1, 1)])  # fmt: skip
def test_gradients_of_a_clip_of_two_frames_by_hand(reverse, task, penalty):
    """Levels 3 and 5 of one input through one weight of 2, q = 0.5."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    for layer in model:
        layer.weight.data.fill_(2.0)
    x = torch.tensor([[1.4], [2.6]], dtype=D, requires_grad=True)
    run = sw.sparse_activations(
        model, "delta", data=[x.detach()], frames=2, step=0.5, strength=10.0, reverse=reverse,
        include="0",
    )  # fmt: skip
    y = model(x)
    assert y.flatten().tolist() == [4 * 1.5, 4 * 2.5]
    (theta,) = run.parameters()
    y[1].sum().backward()
    assert x.grad.flatten().tolist() == [0, 4]
    assert theta.grad.tolist() == [task * 4 * 5]
    theta.grad = None
    model(x)
    run.penalty().backward()
    assert float(run.penalty()) == pytest.approx(10 * 1.0)
    assert theta.grad.tolist() == pytest.approx([penalty * 10 * 2])
    run.remove()


def test_equal_levels_are_equal_bits_and_a_negative_step_is_its_size():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 10
    q = torch.tensor(0.7)
    assert len(quantized(x, q).unique()) == len((x / q).round().unique())


def test_multiplications_of_one_input():
    assert multiplications(nn.Linear(3, 7)) == 7
    assert multiplications(nn.Conv2d(4, 6, 3)) == 54
    assert multiplications(nn.Conv2d(4, 6, 3, stride=2)) == 13.5
    assert multiplications(nn.Conv2d(4, 8, 3, groups=2)) == 36


def test_what_is_no_clip_is_refused():
    model, x = net(), clips().flatten(0, 1)
    with pytest.raises(InvalidArgument, match="whole clips"):
        sw.sparse_activations(model, "delta", data=[x[:5]], frames=2)
    run = sw.sparse_activations(model, "delta", data=[x], frames=2)
    with pytest.raises(InvalidArgument, match="whole clips"):
        model(x[:3])
    run.remove()
    for wrong in ({"step": -1.0}, {"frames": 0}, {"per": "pixel"}, {"reverse": "some"}):
        with pytest.raises(InvalidArgument):
            sw.sparse_activations(model, "delta", data=[x], **wrong)
    run = sw.sparse_activations(model, "teal", data=[x])
    assert float(run.penalty()) == 0 and not list(run.parameters())
    with pytest.raises(ModelError, match="delta"):
        DeltaStream(run)
    with pytest.raises(InvalidArgument, match="every"):
        DeltaStream(run, every=0)
    run.remove()


def test_steps_are_saved(tmp_path):
    model, x = net(), clips().flatten(0, 1)
    run = sw.sparse_activations(model, "delta", data=[x], frames=6)
    with torch.no_grad():
        wanted = model(x)
        run.save(tmp_path / "steps.safetensors")
        run.remove()
        assert not torch.equal(model(x), wanted)
        sw.load_activations(tmp_path / "steps.safetensors", model)
        assert torch.equal(model(x), wanted)
