"""Native programs against torch, operation by operation, on every instruction set."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from convolutions import CONVOLUTIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine.graph import capture
from sparseworks.engine.ir import Precision
from sparseworks.engine.plan import make_plan
from sparseworks.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")

SETS = ("avx512", "avx2", "base")


def agrees(model, *batches, threads=2, parts=1):
    """A plan of the model on the first batch computes all of them as the model does."""
    model = model.eval()
    plan = make_plan(capture(model, (batches[0],), {}), threads)
    assert plan is not None and len(plan.parts) == parts
    with torch.no_grad():
        for x in batches:
            wanted = model(x)
            found = plan(x)
            assert found.shape == wanted.shape
            scale = float(wanted.abs().max()) + 1e-6
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale + 1e-6)
    return plan


def thinned(model, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p *= torch.rand(p.shape, generator=generator) >= sparsity
            else:
                p.normal_(generator=generator)
    return model


@pytest.fixture(params=SETS)
def on_each_set(request, force_isa):
    force_isa(request.param)


@settings(max_examples=60, deadline=None)
@given(
    **CONVOLUTIONS,
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 5),
    batch=st.sampled_from([1, 2, 16, 19, 33]),
    sparsity=st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolutions(
    kernel, stride, padding, dilation, groups, inputs, outputs, height, width, batch, sparsity,
    bias, threads, seed,
):  # fmt: skip
    if stride > 2 and stride == kernel:
        kernel += 1  # patches are left to torch
    torch.manual_seed(seed)
    conv = nn.Conv2d(
        inputs * groups, outputs * groups, kernel, stride, padding, dilation, groups, bias
    )
    model = nn.Sequential(thinned(conv, sparsity, seed), nn.ReLU())
    x = torch.randn(batch, inputs * groups, height, width)
    agrees(model, x, x[:1], threads=threads)


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("batch", [1, 16, 21])
def test_a_residual_network(on_each_set, sparsity, batch):
    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.a = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.b = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.na, self.nb = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
            self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

        def forward(self, x):
            y = F.relu(self.na(self.a(x)))
            return F.relu(self.nb(self.b(y)) + self.short(x))

    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1), Block(16, 16, 1), Block(16, 24, 2), Block(24, 24, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    thinned(model, sparsity)
    agrees(model, torch.randn(batch, 3, 37, 41), torch.randn(3, 3, 37, 41))


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(), nn.Sigmoid(),
     nn.Hardsigmoid(), nn.Tanh()],
    ids=lambda a: type(a).__name__ + str(getattr(a, "approximate", "")),
)  # fmt: skip
def test_activations(on_each_set, activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), activation, nn.Conv2d(8, 4, 3, padding=1))
    x = 3 * torch.randn(2, 4, 9, 11)
    agrees(thinned(model, 0.5), x, x.repeat(9, 1, 1, 1))


def test_squeeze_and_excite_and_depthwise():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Conv2d(8, 24, 1)
            self.deep = nn.Conv2d(24, 24, 5, 2, 2, groups=24)
            self.a, self.b = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
            self.down = nn.Conv2d(24, 8, 1)

        def forward(self, x):
            y = F.hardswish(self.deep(F.hardswish(self.up(x))))
            s = F.adaptive_avg_pool2d(y, 1)
            return self.down(y * F.hardsigmoid(self.b(F.relu(self.a(s)))))

    torch.manual_seed(0)
    agrees(thinned(Net(), 0.4), torch.randn(2, 8, 15, 13), torch.randn(17, 8, 15, 13))


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1),
     nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.MaxPool2d(3, 2, ceil_mode=True)],
    ids=str,
)  # fmt: skip
def test_pools(pool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), pool, nn.Conv2d(6, 4, 3, padding=1))
    agrees(model, torch.randn(2, 3, 14, 17), torch.randn(16, 3, 14, 17))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 300),
    widths=st.lists(st.integers(1, 200), min_size=2, max_size=4),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    threads=st.integers(1, 4),
)
def test_linear_layers_on_any_number_of_rows(rows, widths, sparsity, threads):
    torch.manual_seed(0)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.GELU()]
    model = thinned(nn.Sequential(*layers), sparsity)
    agrees(model, torch.randn(rows, widths[0]), torch.randn(5, widths[0]), threads=threads)


class Encoder(nn.Module):
    """Attention with fewer key heads than query heads, and a mask or none."""

    def __init__(self, heads=4, groups=2, size=8, causal=False):
        super().__init__()
        self.heads, self.groups, self.size, self.causal = heads, groups, size, causal
        width = heads * size
        self.norm = nn.LayerNorm(width)
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, groups * size) for _ in range(2))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x, mask=None):
        b, s, _ = x.shape

        def split(t, n):
            return t.view(b, s, n, self.size).transpose(1, 2)

        y = self.norm(x)
        q, k, v = split(self.q(y), self.heads), split(self.k(y), self.groups), self.v(y)
        a = F.scaled_dot_product_attention(
            q, k, split(v, self.groups), attn_mask=mask, is_causal=self.causal,
            enable_gqa=self.heads != self.groups,
        )  # fmt: skip
        x = x + self.o(a.transpose(1, 2).reshape(b, s, -1))
        return x + self.down(F.silu(self.up(self.norm(x))))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (4, 1)])
def test_attention(on_each_set, causal, heads, groups):
    torch.manual_seed(0)
    model = thinned(Encoder(heads, groups, causal=causal), 0.6)
    width = heads * 8
    agrees(model, torch.randn(3, 20, width), torch.randn(1, 77, width), torch.randn(2, 300, width))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["keys", "full", "nothing", "float"])
def test_masks_of_attention(kind, threads):
    torch.manual_seed(0)
    model = thinned(Encoder(), 0.5).eval()
    x = torch.randn(3, 21, 32)
    mask = torch.ones(3, 1, 21, 21, dtype=torch.bool)
    if kind == "keys":
        mask[1, :, :, 9:] = False
    elif kind == "full":
        mask = torch.rand(3, 1, 21, 21) > 0.4
        mask |= torch.eye(21, dtype=torch.bool)
    elif kind == "float":
        mask = torch.randn(3, 1, 21, 21)
    plan = make_plan(capture(model, (x, mask), {}), threads)
    assert plan is not None and plan.parts[0].masks
    with torch.no_grad():
        torch.testing.assert_close(plan(x, mask), model(x, mask), rtol=1e-4, atol=1e-5)


def test_what_is_not_known_runs_through_torch_in_between():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            y = torch.cumsum(F.relu(self.a(x)), 1)
            return self.b(y), y.sort(1).values

    torch.manual_seed(0)
    model = thinned(Net(), 0.5).eval()
    x = torch.randn(5, 3, 9, 9)
    plan = make_plan(capture(model, (x,), {}), 2)
    assert plan is not None and len(plan.parts) == 2
    with torch.no_grad():
        for got, wanted in zip(plan(x), model(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_value_that_changes_in_place_is_not_taken_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            y = self.a(x)
            z = F.relu_(y)
            return self.b(y + z)  # y is what relu_ made of it

    torch.manual_seed(0)
    model = thinned(Net(), 0.2).eval()
    x = torch.randn(2, 3, 5, 5)
    plan = make_plan(capture(model, (x,), {}), 2)
    with torch.no_grad():
        wanted = model(x)
        if plan is not None:
            torch.testing.assert_close(plan(x), wanted, rtol=1e-4, atol=1e-5)


def test_an_image_too_small_for_the_kernel_is_named():
    model = thinned(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.5).eval()
    plan = make_plan(capture(model, (torch.randn(2, 3, 8, 8),), {}), 1)
    assert plan is not None
    with pytest.raises(ModelError, match="smaller than the kernel"):
        plan.parts[0].run({plan.parts[0].inputs[0]: torch.randn(1, 3, 2, 2)}, {})


@pytest.mark.parametrize(
    "x, what",
    [
        (torch.randn(2, 4, 8, 9), r"has shape \[2, 4, 8, 9\], .* for \[any, 3, any, any\]"),
        (torch.randn(3, 8, 8), "shape"),
        (torch.randn(2, 3, 8, 8).double(), "float32 is needed"),
        (1.0, "float32 is needed"),
    ],
    ids=["size", "axes", "dtype", "type"],
)
def test_other_inputs_than_the_example_are_refused(x, what):
    model = thinned(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.5).eval()
    plan = make_plan(capture(model, (torch.randn(2, 3, 8, 8),), {}), 1)
    with pytest.raises(InvalidArgument, match=what):
        plan(x)


def test_sizes_that_belong_together_are_checked():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x, y):
            return self.a(x) + y

    model = thinned(Net(), 0.5).eval()
    plan = make_plan(capture(model, (torch.randn(2, 3, 6), torch.randn(2, 3, 6)), {}), 1)
    plan(torch.randn(4, 5, 6), torch.randn(4, 5, 6))
    with pytest.raises(InvalidArgument, match="has shape"):
        plan(torch.randn(4, 5, 6), torch.randn(4, 2, 6))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 32, 32)),
        (nn.Conv2d(5, 9, 3, 2, 1), (5, 17, 23)),
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), (8, 16, 16)),
        (nn.Linear(33, 20), (7, 33)),
        (nn.Linear(64, 48), (128, 64)),
    ],
    ids=str,
)
def test_products_in_bf16_round_what_they_read_and_nothing_else(
    on_each_set, layer, shape, sparsity
):
    model = thinned(copy.deepcopy(layer), sparsity).eval()
    for batch in (1, 18):
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        plan = make_plan(capture(model, (x,), {}), 2, Precision.BF16)
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            exact.weight.copy_(model.weight.bfloat16())
            wanted = exact(x.bfloat16().double()).float()
            torch.testing.assert_close(plan(x), wanted, rtol=1e-5, atol=1e-5)


def test_copies_stay_fp32_in_a_bf16_plan(on_each_set):
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, 2, 1)

        def forward(self, x):
            side = nn.functional.pad(nn.functional.relu(x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
            return self.conv(x) * 0 + side

    x = torch.randn(2, 4, 16, 16)
    model = Shortcut().eval()
    plan = make_plan(capture(model, (x,), {}), 1, Precision.BF16)
    with torch.no_grad():
        torch.testing.assert_close(plan(x), model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pad", [(0, 1, 0, 1), (1, 1, 1, 1), (1, 2, 1, 2), (0, 3, 0, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_before_a_convolution_is_part_of_it(pad, stride):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ZeroPad2d(pad), thinned(nn.Conv2d(8, 8, 3, stride), 0.7), nn.ReLU(),
        nn.ZeroPad2d(pad), nn.Conv2d(8, 8, 3, stride, groups=8),
    )  # fmt: skip
    x = torch.randn(18, 3, 20, 23)
    plan = agrees(model, x, x[:1])
    assert len(plan.steps) == 1


def test_other_paddings_stay_with_torch():
    torch.manual_seed(0)
    for pad in (nn.ZeroPad2d((0, 1, 2, 1)), nn.ConstantPad2d(1, 0.5), nn.ReflectionPad2d(1)):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), pad, nn.Conv2d(8, 4, 3)).eval()
        x = torch.randn(2, 3, 12, 12)
        plan = make_plan(capture(model, (x,), {}), 1)
        with torch.no_grad():
            torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_attention_of_torch_comes_to_an_end_and_agrees(batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Linear(32, 32)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)

        def forward(self, x):
            x = self.before(x)
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    model = thinned(Net(), 0.7).eval()
    x = torch.randn(4, 6, 32)
    plan = make_plan(capture(model, (x,), {}), 2)
    assert plan is not None
    with torch.no_grad():
        torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-5)
