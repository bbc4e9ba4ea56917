"""Linear layers that read all pixels of an image."""

from __future__ import annotations

import pytest
import torch
from plans import calls, planned, products
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")

FLATTENED = {
    "module": nn.Flatten(),
    "function": lambda x: torch.flatten(x, 1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "the batch told": lambda x: x.reshape(-1, x[0].numel()),
    "channels last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
}
POOLED = {
    "largest": (nn.MaxPool2d(2), 8 * 6 * 8),
    "mean": (nn.AvgPool2d(4), 8 * 3 * 4),
    "adaptive": (nn.AdaptiveAvgPool2d((3, 2)), 8 * 6),
    "of all": (nn.AdaptiveAvgPool2d(1), 8),
    "not at all": (nn.Identity(), 8 * 12 * 17),
}


class Classifier(nn.Module):
    def __init__(self, pool, flatten, channels):
        super().__init__()
        self.conv, self.pool, self.flatten = nn.Conv2d(3, 8, 3, padding=1), pool, flatten
        self.hidden, self.head = nn.Linear(channels, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.flatten(self.pool(F.relu(self.conv(x))))
        return self.head(F.dropout(F.relu(self.hidden(x)), 0.5, self.training))


@pytest.mark.parametrize("batch", [2, 18])
@pytest.mark.parametrize("flatten", FLATTENED)
@pytest.mark.parametrize("pool", POOLED)
def test_both_linear_layers_skip_their_zeros(pool, flatten, batch):
    torch.manual_seed(0)
    module, channels = POOLED[pool]
    plan = planned(Classifier(module, FLATTENED[flatten], channels), torch.randn(batch, 3, 12, 17))
    assert products(plan) == ["conv.weight", "hidden.weight", "head.weight"]
    assert not any(word in call for call in calls(plan) for word in ("linear", "mm", "relu"))


def test_the_size_of_the_images_is_that_of_the_example(program_wins):
    torch.manual_seed(0)
    module, channels = POOLED["largest"]
    x = torch.randn(2, 3, 12, 17)
    compiled = sw.compile(Classifier(module, nn.Flatten(), channels).eval(), x)
    assert compiled.kind == "program" and "hidden.weight" not in compiled.skipped
    with pytest.raises(InvalidArgument, match="shape"):
        compiled(torch.randn(2, 3, 24, 17))


def test_images_of_any_size_stay_where_all_pixels_are_averaged():
    torch.manual_seed(0)
    module, channels = POOLED["of all"]
    model = Classifier(module, nn.Flatten(), channels)
    plan, x = planned(model, torch.randn(2, 3, 12, 17)), torch.randn(2, 3, 9, 30)
    with torch.no_grad():
        torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-5)
