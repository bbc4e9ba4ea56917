"""A cut that cannot be is an error that names the layer, and changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import ModelError

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Literal(nn.Module):
    """A width that is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(6, 8), nn.Linear(8, 4), (8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(-1, 8))


class Shifted(nn.Linear):
    """A weight that a constant is added to: zero weights are not zero."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + 1, self.bias)


class Nested(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 6), inner, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(torch.tanh(self.first(x)))))


def shifted() -> nn.Module:
    return nn.Sequential(Shifted(6, 8), Shifted(8, 4))


def refused(model: nn.Module, words: str, **options: object) -> None:
    """`slim` fails with these words, and the model is what it was, to every bit and attribute."""
    model.train()
    model.last.eval()
    state = copy.deepcopy(model.state_dict())
    held = {n: {k: v for k, v in vars(m).items() if k[0] != "_"} for n, m in model.named_modules()}
    modules, output = dict(model.named_modules()), model(X)
    with pytest.raises(ModelError, match=words):
        sw.slim(model, X, flops=0.5, **options)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    for name, module in modules.items():
        assert {k: v for k, v in vars(module).items() if k[0] != "_"} == held[name]
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.equal(model(X), output)


def test_a_size_in_the_code_is_refused_with_the_module() -> None:
    refused(Nested(Literal()), "does not run with its new shapes at inner ", include="inner.*")


def test_what_differs_from_zeroing_is_refused_with_the_first_layer() -> None:
    words = r"differs from the zeroed one by .* first in the output of inner\.1;"
    refused(Nested(shifted()), words, include="inner.*")


def test_a_result_that_is_not_a_number_is_refused() -> None:
    class Ratio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y / y

    refused(Nested(Ratio()), "differs from the zeroed one by inf", include="inner.*")
