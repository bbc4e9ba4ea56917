"""Images that threads share band by band give what torch gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparseworks.engine.geometry import whole_rows
from sparseworks.engine.graph import capture
from sparseworks.engine.ir import Precision
from sparseworks.engine.plan import make_plan
from sparseworks.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")


class Net(nn.Module):
    """Every operation on images, of which most see rows of other bands."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.across = nn.Conv2d(12, 12, (1, 3), padding=(0, 1))
        self.down = nn.Conv2d(12, 12, 3, 2, 1)
        self.upright = nn.Conv2d(12, 12, (3, 1), padding=(1, 0))
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.short, self.gate = nn.Conv2d(12, 12, 1, 2), nn.Conv2d(12, 12, 1)
        self.last, self.head = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 5)
        with torch.no_grad():
            for p in self.parameters():
                p *= torch.rand(p.shape) < 0.6

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.across(x) + x)
        x = F.silu(self.upright(x)) * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = F.hardswish(self.deep(F.max_pool2d(x, 3, 1, 1)) + x)
        x = F.relu(self.down(x) + self.short(x))
        return self.head(self.last(x).mean((2, 3))), F.avg_pool2d(x, 2)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(32, 32), (48, 28), (34, 47), (96, 16)])
def test_threads_share_images(size, threads, precision):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 3, *size)
    plan = make_plan(capture(model, (x,), {}), threads, precision)
    with torch.no_grad():
        for batch in (x, x[:1]):
            for got, wanted in zip(plan(batch), model(batch), strict=True):
                error = float((got - wanted).abs().max() / wanted.abs().max())
                assert error < {1: 1e-5, 2: 3e-2, 4: 1e-1}[precision]


def test_bands_hold_all_rows():
    g = whole_rows(32, 32, 1, bands=4)
    assert g.size == 4 * (8 + 2) * 32 and g.plane == 10 * 32
