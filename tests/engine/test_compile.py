"""A compiled model computes what its model computes, in whatever way it runs."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine import compiling
from sparseworks.engine.measuring import tensors_of
from sparseworks.kernels.native import available
from sparseworks.models.calls import call

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from families import FAMILIES, make

needs_native = pytest.mark.skipif(not available(), reason="the native kernels are not built")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_computes_the_same(name, program_wins):
    model, batches = make(name)
    sw.prune(model, "magnitude", sparsity=0.8)
    before = copy.deepcopy(model.state_dict())
    compiled = sw.compile(model, batches[0])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for batch in batches:  # the second is another batch of the same kind
        with torch.no_grad():
            expected = tensors_of(call(model.eval(), batch))
            got = compiled(**batch) if isinstance(batch, dict) else compiled(batch)
        for a, b in zip(expected, tensors_of(got), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    assert compiled.error <= 1e-4
    assert compiled.kind in compiled.explain()


@needs_native
@pytest.mark.parametrize("name", ["bert", "vit", "resnet"])
def test_these_families_run_as_programs(name, program_wins):
    names = [n for n in FAMILIES if name in n.lower()]
    if not names:
        pytest.skip(f"no family {name}")
    model, batches = make(names[0])
    sw.prune(model, "magnitude", sparsity=0.8)
    compiled = sw.compile(model, batches[0])
    assert compiled.kind == "program", compiled.notes
    assert "GFLOP/s" in compiled.explain()


def test_what_cannot_be_captured_still_runs():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x):
            return self.layer(x) if float(x.sum()) > 0 else -self.layer(x)

    model = Branches()
    sw.prune(model, "magnitude", sparsity=0.9)
    compiled = sw.compile(model, torch.ones(4, 32))
    assert compiled.kind in ("torch", "layers")
    assert (
        any("no program" in note for note in compiled.notes) and "no program" in compiled.explain()
    )
    for x in (torch.ones(4, 32), -torch.ones(4, 32)):
        torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_fastest_way_is_taken(monkeypatch):
    model = nn.Sequential(nn.Linear(32, 32))
    sw.prune(model, "magnitude", sparsity=0.9)
    monkeypatch.setattr(compiling, "interleaved_ms", lambda *runs: [1.0, 2.0, 3.0][: len(runs)])
    assert sw.compile(model, torch.randn(4, 32)).kind == "torch"


@needs_native
def test_concurrent_callers_do_not_disturb_each_other(program_wins):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, 2, 1), nn.ReLU()
    ).eval()
    sw.prune(model, "magnitude", sparsity=0.7, include="*")
    compiled = sw.compile(model, torch.randn(2, 3, 12, 12))
    assert compiled.kind == "program"
    inputs = [torch.randn(1 + i % 20, 3, 12, 12) for i in range(60)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(compiled, inputs), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@needs_native
def test_arguments_are_those_of_the_example(program_wins):
    model, batches = make(next(n for n in FAMILIES if "bert" in n.lower()))
    sw.prune(model, "magnitude", sparsity=0.8)
    compiled = sw.compile(model, batches[0])
    assert compiled.kind == "program"
    with pytest.raises(InvalidArgument, match="arguments input_ids, attention_mask"):
        compiled(**batches[0], output_attentions=True)
    with pytest.raises(InvalidArgument, match="attention_mask is missing"):
        compiled(batches[0]["input_ids"])


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def rows() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 12)).eval()


class Flipped(nn.Module):
    """Its last step is torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = rows()

    def forward(self, x):
        return self.inner(x).flip(0)


@needs_native
@pytest.mark.parametrize("way", ["program", "torch"])
@pytest.mark.parametrize("make_model", [convolutions, rows, Flipped])
@pytest.mark.parametrize("batch", [1, 16, 20, 150])
def test_a_result_goes_where_the_caller_says(make_model, batch, way, request):
    if way == "program":
        request.getfixturevalue("program_wins")
    model = make_model().eval()
    x = torch.randn(batch, 3, 12, 12) if make_model is convolutions else torch.randn(batch, 12)
    compiled = sw.compile(model, x)
    if way == "torch":
        compiled = compiling.Compiled(model, "torch")
    with torch.no_grad():
        wanted = model(x)
    out = torch.full_like(wanted, float("nan"))
    assert compiled(x, out=out) is out
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    small = out[1:].clone() if batch > 1 else torch.empty(7)
    with pytest.raises(InvalidArgument, match="the result"):
        compiled(x, out=small)


@needs_native
def test_memory_that_cannot_take_a_result_is_refused(program_wins):
    model = rows()
    x = torch.randn(20, 12)
    compiled = sw.compile(model, x)
    before = x.clone()
    odd = [x, x.view(12, 20).t(), torch.empty(20, 12, dtype=torch.float64),
           torch.empty(20, 24)[:, ::2], torch.empty(20, 12, requires_grad=True)]  # fmt: skip
    for out in odd:
        with pytest.raises(InvalidArgument, match="out= is contiguous"):
            compiled(x, out=out)
    assert torch.equal(x, before)


def test_misuse_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(InvalidArgument, match="does not fit"):
        sw.compile(model, torch.randn(2, 9))
    with pytest.raises(InvalidArgument, match="threads=0"):
        sw.compile(model, torch.randn(2, 8), threads=0)
    with pytest.raises(ModelError, match="not on the CPU"):
        sw.compile(nn.Linear(2, 2, device="meta"), torch.randn(1, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"0\.weight"):
        sw.compile(model, torch.randn(2, 8))


def test_bf16_is_a_choice_with_its_error(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    sw.prune(model, "magnitude", sparsity=0.75, pattern="block16x32")
    x = torch.randn(4, 128, 256)
    compiled = sw.compile(model, x, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(x)
        found = compiled(x)
    assert found.dtype == torch.float32
    assert compiled.error == pytest.approx(
        float((found - wanted).abs().max() / wanted.abs().max()), rel=0.05, abs=1e-6
    )
    assert compiled.error < 2e-2 and {"torch", "program", "program, bf16"} <= set(compiled.times)
    if compiled.kind == "program":
        compiled.save(tmp_path / "plan")
        again = sw.load_compiled(tmp_path / "plan")
        assert torch.equal(again(x), found)


def test_other_dtypes_are_refused():
    with pytest.raises(InvalidArgument, match=r"torch\.bfloat16 or torch\.int8"):
        sw.compile(nn.Linear(4, 4), torch.randn(2, 4), dtype=torch.float16)


def test_a_language_model_compiles_without_its_cache():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, vocab_size=200,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 200, (2, 19))
    compiled = sw.compile(model, {"input_ids": ids})
    assert not any("DynamicCache" in note for note in compiled.notes)
    assert model.config.use_cache
    with torch.no_grad():
        wanted = model(ids).logits
    torch.testing.assert_close(compiled(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-4)


def test_the_last_line_tells_what_torch_runs(program_wins):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x):
            return self.b(torch.sin(self.a(x)))

    torch.manual_seed(0)
    compiled = sw.compile(Net(), torch.randn(2, 9, 32))
    assert 0 < compiled.outside.share < 1
    assert compiled.outside.operators.keys() == {"aten.sin.default"}
    last = compiled.explain().splitlines()[-1]
    assert "in torch" in last and "aten.sin.default" in last
    whole = sw.compile(nn.Sequential(nn.Linear(32, 64), nn.ReLU()), torch.randn(2, 9, 32))
    assert whole.outside.share == 0 and whole.explain().endswith("nothing")
