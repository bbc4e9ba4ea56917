"""Models of timm whose blocks hold widths, and whose weights are standardised, are slimmed."""

from __future__ import annotations

import pytest
import torch

import sparseworks as sw

timm = pytest.importorskip("timm")
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "nfnet_l0"])
def test_it_is_slimmed_and_runs(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    result = sw.slim(model, IMAGES, flops=0.7)
    assert result.flops[1] <= 0.7 * result.flops[0] and model(IMAGES).shape == (2, 10)
    assert bool(result.plain) == (name == "nfnet_l0")
