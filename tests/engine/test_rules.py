"""What the rules take into programs: models of other shapes than a ResNet and an encoder."""

from __future__ import annotations

import pytest
import torch
from plans import calls, planned
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.engine.compiled import load_compiled
from sparseworks.engine.graph import capture
from sparseworks.engine.plan import make_plan
from sparseworks.engine.views import base_view
from sparseworks.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")


class Dense(nn.Module):
    """Concatenates, splits, slices and resizes channels; norms by themselves; oblong kernels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, (1, 5), padding=(0, 2))
        self.norm, self.c = nn.BatchNorm2d(19), nn.Conv2d(19, 12, 3, stride=2, padding=1)
        self.d = nn.Conv2d(10, 5, (5, 3), padding=(4, 2), dilation=2)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = F.leaky_relu(self.a(x), 0.2)
        y = torch.cat([x, y, F.relu(self.b(y))], 1)
        y = self.c(F.relu(self.norm(y)))
        one, two = y.chunk(2, 1)
        y = torch.cat([two * torch.sigmoid(one), y[:, 3:7]], 1)
        y = F.leaky_relu(F.interpolate(self.d(y), scale_factor=2))
        return F.avg_pool2d(y, 3, 2, 1), F.max_pool2d(y, (2, 2), ceil_mode=True)


@pytest.mark.parametrize("batch", [2, 18])
@pytest.mark.parametrize("size", [(32, 32), (20, 34)])
def test_channels_are_put_together_and_taken_apart(batch, size):
    torch.manual_seed(0)
    plan = planned(Dense(), torch.randn(batch, 3, *size))
    assert len(plan.parts) == 1 and not calls(plan)


class Branches(nn.Module):
    """As RepVGG: a norm of the input beside two convolutions, in two programs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = F.relu(self.a(x) + self.b(x))
        return self.c(x) + self.d(torch.sin(x)) + x


def test_operands_of_several_programs():
    torch.manual_seed(0)
    assert len(planned(Branches(), torch.randn(2, 4, 12, 12)).parts) == 2


class Fused(nn.Module):
    """Attention as timm writes it, or with the projections cut out of one as GPT-2 does."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.qkv, self.out = kind, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        b, s, _ = x.shape
        if self.kind == "unbound":
            q, k, v = self.qkv(x).reshape(b, s, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (t.view(b, s, 4, 6).transpose(1, 2) for t in self.qkv(x).split(24, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "split")
        return x + self.out(y.transpose(1, 2).reshape(b, s, 24))


@pytest.mark.parametrize("kind", ["unbound", "split"])
def test_fused_projections(kind):
    torch.manual_seed(0)
    plan = planned(Fused(kind), torch.randn(3, 17, 24))
    assert len(plan.parts) == 1 and not any("attention" in c for c in calls(plan))


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_encoder_of_torch(norm_first, tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, norm_first=norm_first)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(3, 17, 24)
    plan = planned(model, x)
    assert len(plan.parts) == 1 and not any("attention" in c for c in calls(plan))
    compiled = sw.compile(model, x)
    if compiled.plan is not None:
        compiled.save(tmp_path / "plan")
        torch.testing.assert_close(load_compiled(tmp_path / "plan")(x), compiled(x))


def test_views_that_torch_reads_are_left_to_it():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.out = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            q = self.q(x).view(*x.shape[:2], 4, 6).transpose(1, 2)
            y = torch.softmax(q @ q.transpose(2, 3), -1) @ q
            return self.out(y.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    plan = planned(Weights(), torch.randn(3, 17, 24))
    assert not any("linear" in c for c in calls(plan))  # nothing is made twice


def test_a_tensor_that_is_changed_in_place_is_changed_for_all():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.a(x))
            z = torch.zeros_like(y)
            z[:, :, 1:] = y[:, :, :-1]
            w = F.relu_(y)
            return self.b(z) + w + y

    torch.manual_seed(0)
    planned(Shifted(), torch.randn(2, 3, 9, 9))


def test_views_know_where_they_look():
    view = base_view((5, 7, 24))
    heads = view.regrouped((5, 7, 4, 6))
    assert heads is not None and heads.regrouped((5, 7, 24)) == view
    assert view.regrouped((5, 6, 28)) is None and view.regrouped((35, 24)) is not None
    third = view.regrouped((5, 7, 3, 8)).permuted((2, 0, 1, 3)).selected(0, 2)
    assert third.first == 16 and third.dims == view.narrowed(2, 16, 8).dims
    assert view.selected(0, 1) is None and view.squeezed(1) is None and not third.whole(24)


def test_a_spelt_out_gelu():
    class Spelt(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, x):
            y = self.a(x)
            inner = 0.7978845608028654 * (y + 0.044715 * torch.pow(y, 3.0))
            return self.b(0.5 * y * (1.0 + torch.tanh(inner)))

    torch.manual_seed(0)
    plan = planned(Spelt(), torch.randn(3, 7, 12))
    assert len(plan.parts) == 1 and not calls(plan)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "base"])
@pytest.mark.parametrize(
    "activation",
    [nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.Hardsigmoid(), nn.Sigmoid(),
     nn.SiLU(), nn.GELU(), nn.Tanh()],
    ids=lambda a: type(a).__name__,
)  # fmt: skip
def test_what_is_not_a_number_stays_so(activation, isa, force_isa):
    force_isa(isa)
    model = nn.Sequential(nn.Linear(8, 6), activation, nn.Linear(6, 5)).eval()
    plan = make_plan(capture(model, (torch.randn(4, 8),), {}), 1)
    x = torch.randn(4, 8)
    x[1, 3] = float("nan")
    assert plan is not None and plan(x).isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("options", [(2, 2), (3, 1, 1), (3, 2, 1)])
def test_the_largest_of_what_is_not_a_number_is_none(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1, groups=8), nn.MaxPool2d(*options), nn.Conv2d(8, 8, 1))
    model.eval()
    x = torch.randn(2, 8, 12, 12)
    plan = make_plan(capture(model, (x,), {}), 1)
    assert plan is not None
    for place in ((0, 0), (1, 1), (5, 6), (11, 11)):
        given = x.clone()
        given[0, 3, place[0], place[1]] = float("nan")
        with torch.no_grad():
            wanted = model(given)
        assert torch.equal(plan(given).isnan(), wanted.isnan()), place
