"""Convolutions along one axis, in programs as those of images of one row."""

from __future__ import annotations

import pytest
import torch
from plans import calls, planned, products
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")

VIEWS = {"aten.unsqueeze.default", "aten.squeeze.dim", "aten.flatten.using_ints"}


def heavy(plan):
    """What torch runs beside views."""
    return set(calls(plan)) - VIEWS


KINDS = {
    "plain": {},
    "padded": {"padding": 2},
    "strided": {"stride": 2, "padding": 1},
    "strided far": {"stride": 5, "kernel_size": 10},
    "dilated": {"dilation": 3, "padding": 3},
    "in groups": {"groups": 4, "padding": 1},
    "by channel": {"groups": 8, "padding": 4, "kernel_size": 9},
    "of one": {"kernel_size": 1},
    "of the same length": {"bias": False, "padding": "same", "kernel_size": 5},
    "an even kernel": {"padding": "valid", "kernel_size": 4},
}


@pytest.mark.parametrize("batch", [2, 18])
@pytest.mark.parametrize("length", [33, 64, 211])
@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_of_all_kinds(kind, length, batch):
    torch.manual_seed(0)
    options = {"kernel_size": 3} | KINDS[kind]
    model = nn.Sequential(
        nn.Conv1d(3, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, **options), nn.GELU()
    )
    model[1].running_mean.normal_()
    plan = planned(model, torch.randn(batch, 3, length))
    assert len(plan.parts) == 1 and not heavy(plan)
    assert products(plan) == ["0.weight", "3.weight"]


@pytest.mark.parametrize("isa", ["avx512", "avx2", "base"])
def test_on_each_instruction_set(isa, force_isa):
    force_isa(isa)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 8, 7, 2, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.MaxPool1d(2), nn.Conv1d(8, 4, 3)
    )
    assert not heavy(planned(model, torch.randn(2, 2, 150)))


POOLS = {
    "largest": nn.MaxPool1d(2),
    "largest, far": nn.MaxPool1d(3, 2, 1),
    "largest, up": nn.MaxPool1d(4, 3, ceil_mode=True),
    "mean": nn.AvgPool1d(2),
    "mean of what is there": nn.AvgPool1d(3, 1, 1, count_include_pad=False),
    "of all": nn.AdaptiveAvgPool1d(1),
}


@pytest.mark.parametrize("batch", [2, 18])
@pytest.mark.parametrize("kind", POOLS)
def test_a_classifier_of_signals(kind, batch):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv1d(3, 8, 5, padding=2), nn.ReLU(), POOLS[kind], nn.Conv1d(8, 6, 1))
    x = torch.randn(batch, 3, 50)
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(body(x)[0].numel(), 5))
    plan = planned(model, x)
    assert not heavy(plan) and products(plan) == ["0.0.weight", "0.3.weight", "2.weight"]


def test_a_mean_that_counts_zeros_beyond_the_ends_is_right():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 5), nn.AvgPool1d(3, 2, 1), nn.Conv1d(8, 4, 3))
    assert heavy(planned(model, torch.randn(2, 3, 40))) == {"aten.avg_pool2d.default"}


class Residual(nn.Module):
    """Shortcuts, branches side by side, a gate for each channel, and a mean over positions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv1d(8, 8, 1), nn.Conv1d(16, 8, 1)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.norm(self.b(x)) + x)
        x = self.d(torch.cat([x, torch.tanh(self.b(x)) * torch.sigmoid(self.c(x))], 1)) * 0.5
        return self.head(x.mean(-1)), x


@pytest.mark.parametrize("batch", [2, 18])
def test_shortcuts_and_branches(batch):
    torch.manual_seed(0)
    plan = planned(Residual(), torch.randn(batch, 3, 45))
    assert len(plan.parts) == 1 and not heavy(plan)


class Norms(nn.Module):
    """Layer norms over channels, as Wav2Vec2 writes them, then tokens."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 8, 10, 5), nn.Conv1d(8, 8, 3, 2)
        self.one, self.two, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 12)

    def forward(self, x):
        y = F.gelu(self.one(self.a(x[:, None]).transpose(-2, -1)).transpose(-2, -1))
        y = F.gelu(self.one(self.b(y).permute(0, 2, 1)).permute(0, 2, 1))
        return self.head(self.two(y.transpose(1, 2)))


def test_layer_norms_between_convolutions():
    torch.manual_seed(0)
    plan = planned(Norms(), torch.randn(2, 400))
    assert heavy(plan) <= {"aten.transpose.int", "aten.slice.Tensor"} and len(plan.parts) == 2
    assert products(plan) == ["a.weight", "b.weight", "head.weight"]


def test_what_others_read_of_a_signal_is_right():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 3), nn.LayerNorm(8)

        def forward(self, x):
            y = F.relu(self.a(x))
            z = self.norm(y.transpose(1, 2))
            return y.cumsum(2), z, self.b(z.transpose(1, 2)), self.b(y.sin()), y.flatten(0, 1)

    torch.manual_seed(0)
    planned(Net(), torch.randn(2, 3, 40))


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_the_encoder_of_speech(norm, program_wins, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        conv_dim=(16, 16, 16), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2),
        num_feat_extract_layers=3, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        feat_extract_norm=norm, do_stable_layer_norm=norm == "layer",
    )  # fmt: skip
    model, x = transformers.Wav2Vec2Model(config).eval(), torch.randn(2, 1200)
    sw.prune(model, "magnitude", sparsity=0.7)
    compiled = sw.compile(model, x)
    assert compiled.kind == "program", compiled.notes
    encoder = [f"feature_extractor.conv_layers.{i}.conv.weight" for i in range(3)]
    assert set(encoder) <= set(products(compiled.plan))
    compiled.save(tmp_path / "plan")
    with torch.no_grad():
        wanted = model(x).last_hidden_state
    for run in (compiled, sw.load_compiled(tmp_path / "plan")):
        torch.testing.assert_close(run(x).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)
