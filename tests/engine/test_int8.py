"""Products in int8 against the definition in float64, on every instruction set."""

from __future__ import annotations

import copy

import pytest
import torch
from convolutions import CONVOLUTIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError
from sparseworks.engine import compiling
from sparseworks.engine.compiled import Compiled
from sparseworks.engine.graph import capture
from sparseworks.engine.ir import Precision, Product
from sparseworks.engine.plan import make_plan
from sparseworks.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")

SETS = ("avx512", "avx512vbmi2", "avx512f", "avx2", "base")


@pytest.fixture(params=SETS)
def on_each_set(request, force_isa):
    force_isa(request.param)


def rounded(x, axes):
    """Whole numbers in [-127, 127] times a scale; one scale for all of `axes`."""
    largest = x.abs().amax(axes, keepdim=True)
    # 127 / largest would be a product with the reciprocal
    steps = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0)
    return (x * steps).round().double() * (largest.double() / 127)


def by_definition(layer, x):
    """The layer in float64 on rounded weights and inputs."""
    exact = copy.deepcopy(layer).double()
    linear = isinstance(layer, nn.Linear)
    with torch.no_grad():
        weight = layer.weight
        largest = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1))
        scale = largest / 127
        whole = (weight / torch.where(scale > 0, scale, 1)).round()
        exact.weight.copy_(whole.double() * (largest.double() / 127))
        return exact(rounded(x, (-1,) if linear else (1, 2, 3)))


def thinned(layer, sparsity):
    generator = torch.Generator().manual_seed(0)
    layer = copy.deepcopy(layer).eval()
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.weight *= torch.rand(layer.weight.shape, generator=generator) >= sparsity
        layer.weight[0] = 0.0  # a row without weights
        layer.bias.normal_(generator=generator)
    return layer


def planned(model, x, threads=1, precision=Precision.INT8):
    plan = make_plan(capture(model, (x,), {}), threads, precision)
    assert plan is not None
    return plan


def products(plan):
    return [op for part in plan.parts for op in part.ops if isinstance(op, Product)]


def agrees(plan, layer, x):
    wanted = by_definition(layer, x)
    close = 1e-4 * float(wanted.abs().max())
    torch.testing.assert_close(plan(x).double(), wanted, rtol=0, atol=close)


LAYERS = [
    (nn.Conv2d(3, 8, 3, padding=1), (3, 32, 32)),
    (nn.Conv2d(16, 8, 3, padding=1), (16, 32, 32)),
    (nn.Conv2d(5, 9, 3, 2, 1), (5, 17, 23)),
    (nn.Conv2d(6, 9, 5, 1, 2, 2), (6, 14, 13)),
    (nn.Conv2d(8, 8, 3, padding=1, groups=2), (8, 16, 16)),
    (nn.Conv2d(8, 12, 3, 2, 1, groups=2), (8, 32, 32)),
    (nn.Conv2d(130, 8, 1), (130, 4, 4)),
    (nn.Linear(33, 20), (1, 33)),
    (nn.Linear(64, 48), (7, 64)),
    (nn.Linear(700, 30), (130, 700)),
]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("layer, shape", LAYERS, ids=str)
def test_products_are_what_their_definition_says(on_each_set, layer, shape, sparsity):
    layer = thinned(layer, sparsity)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(19, *shape, generator=generator)
    x *= torch.rand(19, *[1] * (x.ndim - 1), generator=generator) * 5
    plan = planned(layer, x)
    assert [op.precision for op in products(plan)] == [Precision.INT8]
    agrees(plan, layer, x)
    agrees(plan, layer, x[:1])


@settings(max_examples=40, deadline=None)
@given(
    **CONVOLUTIONS,
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 5),
    batch=st.sampled_from([1, 2, 16, 19]),
    sparsity=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_convolutions(
    kernel, stride, padding, dilation, groups, inputs, outputs, height, width, batch, sparsity,
    threads,
):  # fmt: skip
    if stride > 2 and stride == kernel:
        kernel += 1  # patches are left to torch
    inputs = inputs * 4 if groups > 1 else inputs + 2
    conv = nn.Conv2d(inputs * groups, outputs * groups, kernel, stride, padding, dilation, groups)
    layer = thinned(conv, sparsity)
    x = torch.randn(
        batch, inputs * groups, height, width, generator=torch.Generator().manual_seed(3)
    )
    plan = planned(layer, x, threads)
    assert [op.precision for op in products(plan)] == [Precision.INT8]
    agrees(plan, layer, x)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("layer, shape", LAYERS, ids=str)
def test_threads_that_share_an_item_agree(layer, shape, batch, threads):
    layer = thinned(layer, 0.3)
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(2))
    agrees(planned(layer, x, threads), layer, x)


@pytest.mark.parametrize("layer, shape", [LAYERS[1], LAYERS[8]], ids=str)
def test_inputs_of_zeros_give_the_bias(on_each_set, layer, shape):
    layer = thinned(layer, 0.5)
    x = torch.zeros(17, *shape)
    x[3, ..., 0] = 1e-38  # less than what can be divided by
    bias = layer.bias.detach().view(-1, *[1] * (x.ndim - 2 if x.ndim == 4 else 0))
    plan = planned(layer, x)
    torch.testing.assert_close(plan(x), bias.expand_as(plan(x)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer, shape", [LAYERS[1], LAYERS[8]], ids=str)
def test_what_is_not_finite_does_not_get_lost(on_each_set, layer, shape, value):
    layer = thinned(layer, 0.0)
    x = torch.randn(17, *shape)
    x[5].view(-1)[9] = value
    found = planned(layer, x)(x)
    assert not bool((found[5, 0] if x.ndim == 3 else found[5]).isfinite().any())
    assert bool(found[[*range(5), *range(6, 17)]].isfinite().all())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [1, 16])
def test_between_layers_there_is_fp32(on_each_set, batch, stride):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride, 1)
            self.short = nn.Conv2d(8, 8, 1, stride)
            self.deep = nn.Conv2d(8, 8, 3, stride, 1, groups=8)  # in fp32, from the same value

        def forward(self, x):
            y = nn.functional.gelu(self.a(x))
            return nn.functional.relu(self.b(y) + self.short(y)) + self.deep(y)

    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(batch, 4, 16, 16)
    with torch.no_grad():
        y = nn.functional.gelu(by_definition(model.a, x)).float()
        wanted = (by_definition(model.b, y) + by_definition(model.short, y)).relu() + model.deep(y)
    # a value of y that rounds to another whole number changes what follows
    close = 1e-2 * float(wanted.abs().max())
    for threads in (1, 3):
        torch.testing.assert_close(
            planned(model, x, threads)(x).double(), wanted, rtol=0, atol=close
        )


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 9, 9)),
        (nn.Conv2d(6, 6, 3, padding=1, groups=2), (6, 9, 9)),
        (nn.Conv2d(1, 6, 3, padding=1), (1, 9, 9)),
        (nn.Linear(70_000, 3), (2, 70_000)),
    ],
    ids=["depthwise", "three channels a group", "one channel", "sums beyond int32"],
)
def test_some_products_stay_fp32(layer, shape):
    layer = thinned(layer, 0.3)
    x = torch.randn(2, *shape)
    plan = planned(layer, x)
    assert [op.precision for op in products(plan)] == [Precision.FP32]
    with torch.no_grad():
        torch.testing.assert_close(plan(x), layer(x), rtol=1e-4, atol=1e-3)


def test_a_saved_plan_keeps_its_precision(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    x = torch.randn(2, 20, 64)
    plan = planned(model, x)
    Compiled(plan, "program", 1e-2).save(tmp_path / "plan")
    loaded = sw.load_compiled(tmp_path / "plan")
    assert [op.precision for op in products(loaded.plan)] == [Precision.INT8] * 2
    assert torch.equal(loaded(x), plan(x)) and "taps, int8" in loaded.explain()


def test_a_plan_of_an_older_format_is_refused(tmp_path):
    from test_saving import changed

    model = nn.Sequential(nn.Linear(8, 8)).eval()
    path = tmp_path / "plan"
    Compiled(planned(model, torch.randn(2, 8)), "program").save(path)
    changed(path, lambda about: about.update(format=1))
    with pytest.raises(CheckpointError, match=r"format 1, .* compile the model again"):
        sw.load_compiled(path)


@pytest.fixture
def last_wins(monkeypatch):
    def times(*runs, repeats=1):
        return [float(len(runs) - i) for i in range(len(runs))]

    monkeypatch.setattr(compiling, "interleaved_ms", times)


def test_int8_is_a_choice_with_its_error(last_wins):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    sw.prune(model, "magnitude", sparsity=0.75, pattern="block16x32")
    x = torch.randn(4, 128, 256)
    compiled = sw.compile(model, x, dtype=torch.int8)
    assert set(compiled.times) == {"torch", "program", "program, int8"}
    with torch.no_grad():
        wanted, found = model(x), compiled(x)
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert found.dtype == torch.float32 and 1e-4 < error < 3e-2
    assert compiled.error == pytest.approx(error)
    assert f"relative error on the example {error:.1e}" in compiled.explain()


def test_a_program_too_far_from_the_model_is_refused(last_wins):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    x = torch.randn(8, 64)
    x[:, 0] = 1e4  # nothing else is left of a token
    with torch.no_grad():
        model[0].weight[:, 0] = 0.0
        model[0].bias.zero_()
    compiled = sw.compile(model, x, dtype=torch.int8)
    assert "program, int8" not in compiled.times and compiled.error < 1e-4
    assert any("no program in int8: its relative error" in note for note in compiled.notes)


def test_a_trained_resnet_keeps_its_predictions(data_root):
    from sparseworks.data import load
    from sparseworks.models.zoo import load_resnet

    pytest.importorskip("pyarrow")
    path = data_root / "cifar10" / "test.parquet"
    x = torch.cat([images for images, _ in load(str(path), samples=512)])
    model = load_resnet(data_root / "models" / "resnet20-cifar10.safetensors").eval()
    plan = planned(model, x[:32], 2)
    with torch.no_grad():
        wanted = model(x)
    found = plan(x)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 5e-2
    assert float((found.argmax(1) == wanted.argmax(1)).float().mean()) > 0.98


def test_a_trained_encoder_keeps_its_embeddings(minilm_path):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    model = AutoModel.from_pretrained(minilm_path).eval()
    texts = ["Weights that are zero need no products.", "The cat sat on the mat."] * 2
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    plan = make_plan(capture(model, (), batch), 2, Precision.INT8)
    assert plan is not None
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state.mean(1)
    found = plan(**batch).last_hidden_state.mean(1)
    assert float(nn.functional.cosine_similarity(found, wanted).min()) > 0.99
