"""The plain loop against the same steps written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparseworks.core.errors import DataError
from sparseworks.training.stepping import train_epochs

G = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(4, 3, generator=G), torch.randint(0, 2, (4,), generator=G))] * 2 + [
    (torch.randn(4, 3, generator=G), torch.randint(0, 2, (4,), generator=G))
]


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_it_takes_the_steps_of_a_written_loop_and_tells_their_losses() -> None:
    model, optimizer = made()
    other, theirs = made()
    seen: list[tuple[str, float, float]] = []
    losses = train_epochs(
        model, lambda epoch: BATCHES[epoch:], lambda b, _: F.cross_entropy(model(b[0]), b[1]),
        [optimizer], epochs=2, steps=4,
        after_step=lambda step, mean: seen.append(("step", step, mean)),
        on_epoch=lambda epoch, mean: seen.append(("epoch", epoch, mean)),
    )  # fmt: skip
    expected = []
    for x, y in [*BATCHES, BATCHES[1]]:  # the second epoch ends with the training
        loss = F.cross_entropy(other(x), y)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        expected.append(float(loss.detach()))
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    means = [sum(expected[: k + 1]) / (k + 1) for k in range(3)]
    assert seen == [
        ("step", 1, means[0]), ("step", 2, means[1]), ("step", 3, means[2]), ("epoch", 0, means[2]),
        ("step", 4, expected[3]), ("epoch", 1, expected[3]),
    ]  # fmt: skip


def test_steps_before_the_first_are_drawn_and_not_taken() -> None:
    model, optimizer = made()
    before = copy.deepcopy(model.state_dict())
    drawn = []

    def batches(epoch: int):
        for batch in BATCHES:
            drawn.append(epoch)
            yield batch

    losses = train_epochs(
        model, batches, lambda b, _: F.cross_entropy(model(b[0]), b[1]), [optimizer],
        epochs=1, steps=3, first_step=3,
    )  # fmt: skip
    assert losses == [] and drawn == [0, 0, 0]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_before_its_step() -> None:
    model, optimizer = made()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match="is nan at step 0"):
        train_epochs(
            model, lambda _: BATCHES, lambda b, _: model(b[0]).sum() * float("nan"), [optimizer],
            epochs=1, steps=3,
        )  # fmt: skip
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
