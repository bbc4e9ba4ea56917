"""Blocks of image models and language models, each in one program."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparseworks.engine.compiled import Compiled, load_compiled
from sparseworks.engine.graph import capture
from sparseworks.engine.ir import Attention
from sparseworks.engine.plan import make_plan
from sparseworks.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")


def planned(model, *inputs, outside=(), parts=1, threads=2, **kwargs):
    """A plan that computes what the model does, with nothing but `outside` left to torch."""
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= torch.rand(p.shape) < 0.5
    model = model.eval()
    plan = make_plan(capture(model, inputs, kwargs), threads)
    assert plan is not None
    with torch.no_grad():
        for given in (inputs, [x[:1] for x in inputs]):
            more = {k: v[: len(given[0])] if given else v for k, v in kwargs.items()}
            torch.testing.assert_close(plan(*given, **more), model(*given, **more),
                                       rtol=1e-4, atol=1e-5)  # fmt: skip
    left = {s.target for s in plan.rest if s not in plan.parts}
    assert left == set(outside) and len(plan.parts) == parts
    return plan


class Up(nn.Module):
    def __init__(self, up, after=8):
        super().__init__()
        self.a, self.up, self.b = nn.Conv2d(3, 8, 3, padding=1), up, nn.Conv2d(after, 4, 1)

    def forward(self, x):
        return self.b(F.relu(self.up(F.relu(self.a(x)))))


UPS = {
    "transposed 2": (nn.ConvTranspose2d(8, 6, 2, 2), 6),
    "transposed 4": (nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), 6),
    "transposed 3": (nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1), 6),
    "transposed 3 by 3": (nn.ConvTranspose2d(8, 6, 3, 3), 6),
    "shuffled": (nn.PixelShuffle(2), 2),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), 8),
    "corners": (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), 8),
    "uneven": (nn.Upsample(scale_factor=1.5, mode="bilinear"), 8),
    "of a size": (nn.Upsample(size=(20, 30), mode="bilinear"), 8),
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), 8),
    "nearest": (nn.Upsample(scale_factor=3), 8),
    "averaged": (nn.AdaptiveAvgPool2d((3, 5)), 8),
    "groups": (nn.GroupNorm(4, 8), 8),
    "groups without weights": (nn.GroupNorm(2, 8, affine=False), 8),
    "instance": (nn.InstanceNorm2d(8, affine=True), 8),
    "prelu": (nn.PReLU(8), 8),
    "prelu of all": (nn.PReLU(), 8),
    "elu": (nn.ELU(0.7), 8),
    "mish": (nn.Mish(), 8),
    "hard swish": (nn.Hardswish(), 8),
    "silu": (nn.SiLU(), 8),
}


@pytest.mark.parametrize("kind", UPS)
@pytest.mark.parametrize("batch", [2, 18])
def test_what_follows_a_convolution(kind, batch):
    torch.manual_seed(0)
    module, after = UPS[kind]
    for p in module.parameters():
        p.data.normal_()
    planned(Up(module, after), torch.randn(batch, 3, 12, 17))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "base"])
@pytest.mark.parametrize("kind", ["bilinear", "groups", "prelu", "elu", "mish", "transposed 4"])
def test_on_each_instruction_set(kind, isa, force_isa):
    force_isa(isa)
    torch.manual_seed(0)
    module, after = UPS[kind]
    planned(Up(module, after), torch.randn(2, 3, 32, 32))


def test_a_saved_plan_has_moves_and_group_norms(tmp_path):
    torch.manual_seed(0)
    up = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.GroupNorm(2, 8))
    x = torch.randn(2, 3, 8, 8)
    plan = planned(Up(up), x)
    Compiled(plan, "program").save(tmp_path / "plan")
    assert torch.equal(load_compiled(tmp_path / "plan", threads=2)(x), plan(x))


class ConvNeXt(nn.Module):
    """Channels last between two convolutions, with a scale for each of them."""

    def __init__(self, c=8):
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, c, 2, 2), nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.gamma = nn.Parameter(torch.randn(c))
        self.head_norm, self.head = nn.LayerNorm(c), nn.Linear(c, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))) * self.gamma
        x = x + y.permute(0, 3, 1, 2)
        y = self.depth(x).permute(0, 2, 3, 1)
        y = self.down(F.gelu(self.up(self.norm(y)))).permute(0, 3, 1, 2)
        x = x + y.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.head(self.head_norm(x.mean([-2, -1])))


@pytest.mark.parametrize("batch", [2, 18])
@pytest.mark.parametrize("size", [(20, 34), (32, 32)])
def test_channels_last_blocks(batch, size):
    torch.manual_seed(0)
    planned(ConvNeXt(), torch.randn(batch, 3, *size))


def test_channels_last_that_torch_reads_are_right():
    class Net(ConvNeXt):
        def forward(self, x):
            y = self.stem(x).permute(0, 2, 3, 1)
            z = self.norm(y)
            return self.up(z), torch.cumsum(z, 1), self.depth(z.permute(0, 3, 1, 2).sin())

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 12, 10)
    plan = make_plan(capture(model, (x,), {}), 1)
    with torch.no_grad():
        torch.testing.assert_close(plan(x), model(x), rtol=1e-4, atol=1e-5)


def test_patches_are_one_product():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.ReLU(), nn.Conv2d(12, 5, 1))
    planned(model, torch.randn(2, 3, 16, 24), outside=["aten.pixel_unshuffle.default"])


def test_squeeze_and_excitation_with_hard_functions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

        def forward(self, x):
            x = F.hardswish(self.a(x))
            y = F.adaptive_avg_pool2d(x, 1)
            return x * F.hardsigmoid(self.c(F.relu(self.b(y))))

    torch.manual_seed(0)
    planned(Net(), torch.randn(3, 3, 12, 12))


class Root(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(c) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Rotary(nn.Module):
    """A block as Llama has it: norm by the root mean square, rotary, shared heads, gated layers."""

    def __init__(self, c=24, heads=4, shared=2):
        super().__init__()
        self.size = c // heads
        self.norm, self.after = Root(c), nn.RMSNorm(c)
        self.q, self.k = nn.Linear(c, c), nn.Linear(c, shared * self.size)
        self.v, self.out = nn.Linear(c, shared * self.size), nn.Linear(c, c)
        self.gate, self.up, self.down = nn.Linear(c, 40), nn.Linear(c, 40), nn.Linear(40, c)

    def forward(self, x):
        b, s, c = x.shape
        angles = torch.arange(s)[:, None] * 0.5 ** torch.arange(self.size // 2)[None]
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos(), angles.sin()

        def turned(t):
            one, two = t[..., : self.size // 2], t[..., self.size // 2 :]
            return t * cos + torch.cat([-two, one], -1) * sin

        y = self.norm(x)
        q, k, v = (f(y).view(b, s, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, c))
        y = self.after(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@pytest.mark.parametrize("norm", [Root, nn.RMSNorm, nn.LayerNorm])
def test_norms_of_queries_and_keys(norm):
    class Net(Rotary):
        def __init__(self):
            super().__init__()
            self.q_norm, self.k_norm = norm(self.size), norm(self.size)

        def forward(self, x):
            b, s, c = x.shape
            q, k, v = (f(x).view(b, s, -1, self.size) for f in (self.q, self.k, self.v))
            q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k.transpose(1, 2))
            y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), enable_gqa=True)
            return self.out(y.transpose(1, 2).reshape(b, s, c))

    torch.manual_seed(0)
    planned(Net(), torch.randn(3, 19, 24))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "base"])
def test_rotary_embeddings(isa, force_isa):
    force_isa(isa)
    torch.manual_seed(0)
    plan = planned(Rotary(), torch.randn(3, 19, 24))
    assert sum(isinstance(op, Attention) for op in plan.parts[0].ops) == 1


def test_positions_and_masks_that_are_added_and_multiplied():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 8)
            self.places = nn.Parameter(torch.randn(1, 9, 16))

        def forward(self, x, mask):
            return self.b((self.a(x) + self.places) * mask.unsqueeze(2))

    torch.manual_seed(0)
    mask = (torch.rand(3, 9) > 0.3).float()
    plan = planned(Net(), torch.randn(3, 9, 12), mask, outside=[
        "aten.unsqueeze.default", "aten.expand.default", "aten.contiguous.default"])  # fmt: skip
    assert len(plan.parts) == 1


@pytest.mark.parametrize("kind", ["t5", "mpnet", "llama"])
def test_language_models_are_one_program(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "t5":
        config = transformers.T5Config(d_model=24, num_layers=2, num_heads=4, d_ff=32, d_kv=6,
                                       vocab_size=50)  # fmt: skip
        model = transformers.T5EncoderModel(config)
    elif kind == "mpnet":
        config = transformers.MPNetConfig(**sizes, intermediate_size=32, vocab_size=50)
        model = transformers.MPNetModel(config, add_pooling_layer=False)
    else:
        config = transformers.LlamaConfig(
            **sizes, num_key_value_heads=2, intermediate_size=32, vocab_size=50, use_cache=False
        )
        model = transformers.LlamaModel(config)
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    ids, mask = torch.randint(5, 50, (3, 19)), torch.ones(3, 19, dtype=torch.long)
    mask[0, 13:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    model = model.eval()
    plan = make_plan(capture(model, (), given), 2)
    with torch.no_grad():
        found, wanted = plan(**given)[0], model(**given)[0]
    seen = mask.bool()
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-3, atol=1e-4)
    assert len(plan.parts) == 1
    assert sum(isinstance(op, Attention) for op in plan.parts[0].ops) == 2
    left = {s.target for s in plan.rest if s not in plan.parts}
    assert not any(word in t for t in left for word in ("mm", "linear", "softmax", "rsqrt", "cat"))
