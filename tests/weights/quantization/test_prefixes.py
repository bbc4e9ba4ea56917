"""Losses without the blocks that stay as they are: the same numbers, fewer computations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiny_models
from sparseworks.models.calls import default_loss
from sparseworks.weights.quantization.prefixes import PrefixLosses


class Chain(nn.Module):
    """Three blocks; `wired` says how they depend on each other."""

    def __init__(self, wired: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)
        )  # fmt: skip
        self.head, self.wired, self.calls = nn.Linear(6, 3), wired, [0, 0, 0]
        for i, block in enumerate(self.blocks):
            block.register_forward_hook(lambda *_, i=i: self.count(i))

    def count(self, i: int) -> None:
        self.calls[i] += 1

    def forward(self, x):
        a, b, c = self.blocks
        if self.wired == "chain":
            return self.head(c(b(a(x))))
        if self.wired == "in place":
            return self.head(c(b(a(x).mul_(0.5))))
        if self.wired == "skip":
            first = a(x)
            return self.head(c(b(first)) + first)
        if self.wired == "backwards":
            return self.head(a(b(c(x))))
        if self.wired == "twice":
            return self.head(c(b(b(a(x)))))
        return self.head(a(x) + b(x) + c(x))


def batches():
    torch.manual_seed(1)
    x, y = torch.randn(12, 6), torch.arange(12) % 3
    return [(x[:6], y[:6]), (x[6:], y[6:])]


@pytest.mark.parametrize("wired", ["chain", "in place", "skip", "backwards", "twice", "parallel"])
@torch.no_grad()
def test_losses_are_those_of_the_whole_model(wired):
    model = Chain(wired).eval()
    losses = PrefixLosses(model, batches(), default_loss, list(model.blocks))
    for place, block in enumerate(model.blocks):
        losses.skip(place)
        kept = copy.deepcopy(block.state_dict())
        block[0].weight.mul_(0.5)
        whole = sum(float(default_loss(model, b)) for b in batches()) / 2
        assert losses.mean() == whole
        assert whole != losses.dense
        block.load_state_dict(kept)
    assert all("forward" not in b.__dict__ for b in model.blocks)


@torch.no_grad()
def test_blocks_before_are_not_computed():
    model = Chain("chain").eval()
    losses = PrefixLosses(model, batches(), default_loss, list(model.blocks))
    losses.skip(2)
    inner = []
    handles = [b[0].register_forward_hook(lambda *_, i=i: inner.append(i))
               for i, b in enumerate(model.blocks)]  # fmt: skip
    assert losses.mean() == losses.dense
    assert inner == [2, 2]  # two batches
    for h in handles:
        h.remove()


@torch.no_grad()
def test_blocks_of_a_language_model_are_skipped():
    model, texts = tiny_models.language_model().eval(), tiny_models.texts()
    layers = list(model.model.layers)
    losses = PrefixLosses(model, texts, default_loss, layers)
    losses.skip(len(layers) - 1)
    assert losses.skipped == len(layers) - 1 > 0
    layers[-1].mlp.down_proj.weight.mul_(0.5)
    assert losses.mean() == sum(float(default_loss(model, b)) for b in texts) / len(texts)
