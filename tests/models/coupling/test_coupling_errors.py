"""What cannot be followed is an error that says where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.models.coupling import CouplingError, trace


class Unfollowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.fft.fft(self.first(x)).abs())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if bool(x.sum() > 0) else -x


def test_an_unknown_operation_is_named_with_its_source() -> None:
    with pytest.raises(CouplingError, match=r"cannot follow .*fft.*test_coupling_errors\.py"):
        trace(Unfollowed(), torch.randn(3, 4))


def test_a_model_that_cannot_be_exported_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"torch\.export cannot follow"):
        trace(Branching(), torch.randn(3, 4))


def test_hard_coded_slices_freeze_their_axis() -> None:
    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)[:, 2:5])

    assert trace(Hard(), torch.randn(2, 4)).families == ()


def test_unreached_parameters_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model.spare = nn.Linear(3, 3)
    coupling = trace(_First(model), torch.randn(2, 4))
    assert "model.spare.weight" in coupling.unreached


class _First(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model[1](self.model[0](x))
