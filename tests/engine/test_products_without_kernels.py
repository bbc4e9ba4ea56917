"""A sparse linear layer where no native kernels could be built: torch serves."""

from __future__ import annotations

import pickle

import torch

from sparseworks.engine.products import SparseLinear
from sparseworks.kernels import native


def test_torch_serves_where_there_are_no_kernels(monkeypatch):
    w, b, x = torch.randn(10, 12) * (torch.rand(10, 12) < 0.3), torch.randn(10), torch.randn(3, 12)
    monkeypatch.setattr(native, "module", lambda: None)
    for bias in (b, None):
        layer = SparseLinear(w, bias)
        expected = torch.nn.functional.linear(x, w, bias)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.columns(x.t()), expected.t())
        torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), expected)
