"""The law of rearranging: the function stays, the retained score does not fall."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.patterns import parse_pattern
from sparseworks.models.views import find_prunable
from sparseworks.models.zoo import resnet20, resnet56
from sparseworks.weights.semistructured.rearranging import Rearrangement, rearrange

sys.path.insert(0, str(Path(__file__).parents[2] / "models" / "coupling"))
from architectures import KINDS, Network, Plan, plans

SMALL = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def varied(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms, statistics and scales of channels that differ, so that every mistake shows."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            scale = torch.rand(len(module.weight)) + 0.1
            module.weight.data.mul_(scale.view(-1, *[1] * (module.weight.ndim - 1)))
    return model.eval()


def total(model: nn.Module, pattern: str, sparsity: float) -> float:
    """Retained |w| over all weights, from the pattern's own masks."""
    legal, kept = parse_pattern(pattern), 0.0
    for view in find_prunable(model):
        scores = view.matrix().abs().double()
        mask = legal.select(scores.float(), legal.keep(view.shape, sparsity))
        kept += float(scores[mask].sum())
    return kept


def check(model: nn.Module, example: Tensor, pattern: str, sparsity: float = 0.5) -> Rearrangement:
    before = {n: t.clone() for n, t in model.state_dict().items()}
    twin = copy.deepcopy(model)
    had = total(model, pattern, sparsity)
    done = rearrange(model, example, sparsity=sparsity, pattern=pattern)
    now = total(model, pattern, sparsity)
    assert now >= had * (1 - 1e-7)
    assert bool(done.permutations) == (now > had * (1 + 1e-9))
    with torch.no_grad():
        scale = float(twin(example).abs().max())
        assert float((model(example) - twin(example)).abs().max()) <= 3e-6 * max(1.0, scale)
        exact, other = model.double()(example.double()), twin.double()(example.double())
        assert float((exact - other).abs().max()) <= 1e-12 * max(1.0, scale)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.flatten().sort().values,
                           before[name].to(tensor).flatten().sort().values)  # fmt: skip
    return done


@pytest.mark.parametrize("pattern", ["shared4", "shared16", "shared4-balanced"])
def test_resnet20_with_its_shared_streams(pattern):
    done = check(varied(resnet20()), torch.randn(1, 3, 16, 16), pattern)
    assert len(done.permutations) >= 6
    inner = "layer2.1.conv1.weight"
    assert done.after[inner] > done.before[inner]


def test_resnet56():
    done = check(varied(resnet56()), torch.randn(1, 3, 8, 8), "shared4")
    assert len(done.permutations) >= 27


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.skip = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.skip else y


def test_inverted_residuals_with_depthwise_convolutions_and_a_short_last_group():
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3, 2, 1), InvertedResidual(10, 10, 1), InvertedResidual(10, 18, 2),
        InvertedResidual(18, 18, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(18, 5),
    )  # fmt: skip
    done = check(varied(model), torch.randn(2, 3, 12, 12), "shared4")
    assert "1.body.0.weight" not in done.fixed and "1.body.6.weight" not in done.fixed


class Transformer(nn.Module):
    """A stream with layer norms, one attention and one gated MLP, tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.gate, self.down = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)
        self.head = nn.Linear(24, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        n, length, _ = x.shape
        packed = self.qkv(self.norm1(x)).view(n, length, 3, 3, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(packed[0], packed[1], packed[2])
        x = x + self.out(y.transpose(1, 2).reshape(n, length, 24))
        z = self.norm2(x)
        logits: Tensor = self.head(x + self.down(F.silu(self.gate(z)) * self.up(z)))
        return logits


def test_a_transformer_with_tied_embeddings():
    torch.manual_seed(0)
    model = varied(Transformer())
    tokens = torch.randint(0, 11, (2, 6))
    twin = copy.deepcopy(model)
    done = rearrange(model, tokens, sparsity=0.5, pattern="shared4")
    assert "up.weight" not in done.fixed and "out.weight" not in done.fixed
    assert model.head.weight is model.embed.weight
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), twin(tokens), rtol=1e-5, atol=1e-6)
        exact = model.double()(tokens) - twin.double()(tokens)
    assert float(exact.abs().max()) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block(kind):
    check(Network(Plan(8, (kind, "residual", kind), "pool", 3)), SMALL, "shared4")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans())
def test_random_networks(plan):
    check(Network(plan), SMALL, "shared2")


class Scaled(nn.Module):
    """Constants that belong to places and are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 3)
        self.scales = torch.arange(1.0, 17.0)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)) * self.scales.to(x.dtype)
        out: Tensor = self.last(torch.relu(self.second(y)))
        return out


def test_what_the_coupling_does_not_see_stays_and_is_named():
    model = varied(Scaled())
    before = model.first.weight.clone()
    done = check(model, torch.randn(4, 6), "shared4")
    assert "would change the function" in done.fixed["first.weight"]
    assert torch.equal(model.first.weight, before.double())
    assert "second.weight" not in done.fixed


def test_what_cannot_be_rearranged_is_refused_and_nothing_changes():
    model = varied(resnet20())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    example = torch.randn(1, 3, 8, 8)
    with pytest.raises(InvalidArgument, match="no groups of outputs"):
        rearrange(model, example, sparsity=0.5, pattern="2:4")
    with pytest.raises(InvalidArgument, match="sparsity"):
        rearrange(model, example, sparsity=1.5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    sw.prune(model, "magnitude", sparsity=0.5, pattern="shared4")
    with pytest.raises(ModelError, match="masks already"):
        rearrange(model, example, sparsity=0.5)


def test_a_model_that_is_not_the_same_twice_is_refused():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(F.dropout(torch.relu(self.a(x)), 0.5, training=True))
            return out

    model = varied(Noisy())
    before = model.a.weight.clone()
    with pytest.raises(ModelError, match="same output twice"):
        rearrange(model, torch.randn(3, 4), sparsity=0.5)
    assert torch.equal(model.a.weight, before)
