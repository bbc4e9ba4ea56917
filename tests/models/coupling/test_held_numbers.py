"""Sizes that a module holds as numbers follow every cut, and cutting is zeroing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from held import BLOCKS, Between
from torch import Tensor, nn

from sparseworks.models.coupling import trace
from sparseworks.weights.structured.cutting import cut, zero

EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def plain(module: nn.Module) -> dict[str, object]:
    """What a module holds beside tensors and modules, with its types."""
    return {
        f"{path}.{name}": (type(value), value)
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if isinstance(value, (int, tuple, list))
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", BLOCKS)
def test_cutting_is_zeroing(kind: str, seed: int) -> None:
    model = Between(kind)
    coupling = trace(model, EXAMPLE)
    rng, keep = np.random.default_rng(seed), coupling.keep_all()
    for family in coupling.families:
        keep[rng.permutation(family.roots)[: rng.integers(1, len(family))]] = False
    zeroed = copy.deepcopy(model)
    zero(zeroed, coupling, keep)
    changes, backup = cut(model, coupling, keep)
    with torch.no_grad():
        torch.testing.assert_close(model(EXAMPLE), zeroed(EXAMPLE), rtol=1e-4, atol=1e-5)
    assert changes
    backup.restore()
    assert plain(model) == plain(Between(kind))


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_width_that_a_number_tells_can_be_cut(kind: str) -> None:
    cuttable = {n for f in trace(Between(kind), EXAMPLE).families if len(f) > 1 for n, _ in f.axes}
    assert {f"block.{name}.weight" for name in BLOCKS[kind][1]} <= cuttable


@pytest.mark.parametrize("kind", BLOCKS)
def test_tracing_leaves_no_number_behind(kind: str) -> None:
    model = Between(kind)
    trace(model, EXAMPLE)
    assert plain(model) == plain(Between(kind)) and "forward" not in vars(model)
    assert {type(v) for v in vars(model.block).values()} & {int, tuple, list}


def test_what_a_forward_writes_down_is_plain() -> None:
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.first = 8, nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            self.seen, self.twice = y.shape, self.width * 2
            return y

    model = Noting()
    trace(model, torch.randn(2, 4))
    assert type(model.twice) is int and {type(n) for n in model.seen} == {int}
    assert isinstance(model.seen, torch.Size)


def test_one_number_for_two_widths_makes_them_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.a, self.b = 6, nn.Linear(4, 6), nn.Linear(4, 6)
            self.c = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x).view(-1, 1, self.width)
            b = torch.relu(self.b(x)).view(-1, 1, self.width)
            return self.c(torch.cat([a, b], 2).flatten(1))

    coupling = trace(Twice(), torch.randn(3, 4))
    a, b = coupling.axes["a.weight", 0], coupling.axes["b.weight", 0]
    assert np.array_equal(a, b) and len(set(a.tolist())) == 6 and 0 not in a


def test_a_number_that_contradicts_itself_after_some_cut_stays() -> None:
    class Square(nn.Module):
        """The width of one layer is also the number of positions."""

        def __init__(self) -> None:
            super().__init__()
            self.side, self.a, self.b = 4, nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(-1, self.side, self.side))

    model, x = Square(), torch.randn(2, 4, 3)
    coupling = trace(model, x)
    assert not coupling.axes["a.weight", 0].any() and not coupling.families


@pytest.mark.parametrize("piece", [lambda y: y[:, 2:5], lambda y: y.split([3, 5], 1)[0][:, :3]])
def test_a_bound_in_the_code_stays_beside_numbers_that_are_held(
    piece: Callable[[Tensor], Tensor],
) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.part, self.a, self.b = 8, 2, nn.Linear(4, 8), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).view(-1, self.width)
            return self.b(piece(y)) + y[:, : self.part] + y.split([3, 5], 1)[0][:, : self.part]

    assert not trace(Mixed(), torch.randn(2, 4)).axes["a.weight", 0].any()


def test_a_model_that_takes_no_number_is_traced_without(caplog: pytest.LogCaptureFixture) -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.a, self.b = 8, nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if type(self.width) is not int:
                raise TypeError("an int is an int")
            return self.b(self.a(x))

    with caplog.at_level(logging.CRITICAL):
        coupling = trace(Strict(), torch.randn(2, 4))
    assert [len(f) for f in coupling.families] == [8]
