"""A training that starts late takes the steps that the whole one would have taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.data.images import ImageSet
from sparseworks.training.fitting import Recipe, fit_classifier

G = torch.Generator().manual_seed(0)
IMAGES = ImageSet(
    torch.randint(0, 256, (40, 3, 8, 8), generator=G, dtype=torch.uint8),
    torch.randint(0, 4, (40,), generator=G),
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


def trace(recipe, first_step):
    """(images of the step, learning rate) for every step taken."""
    taken, rates, model = [], [], net()
    model.register_forward_pre_hook(lambda m, x: taken.append(x[0].clone()))

    def start(model, optimizer, steps):
        optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))

    fit_classifier(model, IMAGES, recipe, start=start, seed=3, first_step=first_step)
    return taken, rates


@pytest.mark.parametrize("schedule", ["one-cycle", "step", "linear"])
@pytest.mark.parametrize("first_step", [0, 3, 5, 19])
def test_order_augmentation_and_rate_go_on(schedule, first_step):
    recipe = Recipe(epochs=4, batch_size=8, schedule=schedule)
    images, rates = trace(recipe, 0)
    later, later_rates = trace(recipe, first_step)
    assert len(later) == 20 - first_step
    assert all(torch.equal(a, b) for a, b in zip(images[first_step:], later))
    assert later_rates == pytest.approx(rates[first_step:])


def test_the_rates_are_those_of_the_formulas():
    _, step = trace(Recipe(epochs=4, batch_size=8, schedule="step", lr=0.2), 0)
    assert step == pytest.approx([0.2] * 10 + [0.02] * 5 + [0.002] * 5)
    _, linear = trace(Recipe(epochs=4, batch_size=8, schedule="linear", lr=0.2), 0)
    assert linear[:2] == pytest.approx([0, 0.1])
    assert linear[2:] == pytest.approx([0.2 * (20 - i) / 18 for i in range(2, 20)])


def test_a_step_that_is_not_there_is_refused():
    with pytest.raises(InvalidArgument, match="first_step=20"):
        fit_classifier(net(), IMAGES, Recipe(epochs=4, batch_size=8), first_step=20)
    with pytest.raises(InvalidArgument, match="schedule"):
        Recipe(schedule="cosine")
