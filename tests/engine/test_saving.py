"""A plan on disk: loaded without measuring, and never anything but a plan."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.engine.compiled import Compiled
from sparseworks.engine.graph import capture
from sparseworks.engine.plan import make_plan
from sparseworks.engine.steps import Call, decode, encode
from sparseworks.io.thinning import thickened
from sparseworks.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x, scale=None):
        y = F.relu(self.a(x)).mean((2, 3))
        y = self.b(y)
        return {"logits": y if scale is None else y * scale, "sum": y.cumsum(1)}


@pytest.fixture
def compiled():
    torch.manual_seed(0)
    model = Net().eval()
    sw.prune(model, "magnitude", sparsity=0.6, include="*")
    plan = make_plan(capture(model, (torch.randn(2, 3, 8, 8),), {}), 2)
    return model, Compiled(plan, "program", 1e-7, {"torch": 2.0, "program": 1.0})


def test_a_loaded_plan_computes_the_same(compiled, tmp_path):
    model, made = compiled
    made.save(tmp_path / "net.plan")
    start = time.perf_counter()
    loaded = sw.load_compiled(tmp_path / "net.plan")
    assert time.perf_counter() - start < 1
    for batch in (1, 20):
        x = torch.randn(batch, 3, 8, 8)
        for key, wanted in model(x).items():
            torch.testing.assert_close(loaded(x)[key], wanted.detach(), rtol=1e-4, atol=1e-5)
            assert torch.equal(loaded(x)[key], made(x)[key])
    assert loaded.times == made.times and loaded.error == made.error


def test_zeros_take_a_bit_and_plans_of_before_are_read(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    sw.prune(model, "magnitude", sparsity=0.9, include="0.weight")
    plan = make_plan(capture(model, (torch.randn(2, 96),), {}), 1)
    made = Compiled(plan, "program", 1e-7, {"torch": 2.0, "program": 1.0})
    path, x = tmp_path / "net.plan", torch.randn(3, 96)
    made.save(path)
    n, kept = 96 * 64, int(sw.masks(model)["0.weight"].sum())
    stored = {t.numel() * t.element_size() for t in load_file(path).values()}
    assert {4 * kept, n // 8} <= stored and 4 * n not in stored
    assert torch.equal(sw.load_compiled(path)(x), made(x))
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["sparseworks_plan"])
    old = thickened(load_file(path), about.pop("thin"))
    about["format"] = 5
    save_file(old, tmp_path / "old.plan", {"sparseworks_plan": json.dumps(about)})
    assert torch.equal(sw.load_compiled(tmp_path / "old.plan")(x), made(x))


def test_only_programs_are_saved(tmp_path):
    for kind, why in (("torch", "torch runs .* fastest"), ("layers", "layer by layer")):
        with pytest.raises(InvalidArgument, match=f"nothing was written: .*{why}.*no plan;"):
            Compiled(nn.Linear(2, 2), kind).save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def changed(path, change):
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["sparseworks_plan"])
    change(about)
    save_file(load_file(path), path, {"sparseworks_plan": json.dumps(about)})


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda a: a.update(format=99), "format 99"),
        (lambda a: a.pop("steps"), "damaged"),
        (lambda a: a.update(thin={"t0": [-3, -1]}), "damaged"),
        (lambda a: a.update(thin=3), "damaged"),
        (lambda a: a["steps"].insert(0, {"call": ["x", "os.system", ["true"], {"map": {}}]}),
         "not one that a plan may run"),
        (lambda a: a["steps"].insert(0, {"call": ["x", "operator.__class__.x", [], {"map": {}}]}),
         "not one that a plan may run"),
    ],
)  # fmt: skip
def test_foreign_and_damaged_plans_are_refused(compiled, tmp_path, change, what):
    path = tmp_path / "net.plan"
    compiled[1].save(path)
    changed(path, change)
    with pytest.raises(CheckpointError, match=what):
        sw.load_compiled(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"nothing")
    save_file({"x": torch.zeros(1)}, tmp_path / "b")
    with pytest.raises(CheckpointError, match="cannot be read"):
        sw.load_compiled(tmp_path / "a")
    with pytest.raises(CheckpointError, match="not a compiled plan"):
        sw.load_compiled(tmp_path / "b")


@pytest.mark.parametrize(
    "value",
    [None, 3, -1.5, float("inf"), "x", [1, [2.0, None]], torch.float32, torch.strided,
     torch.contiguous_format, torch.device("cpu"), {"a": 1}],
    ids=str,
)  # fmt: skip
def test_arguments_survive_json(value):
    assert decode(json.loads(json.dumps(encode(value)))) == value


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(CheckpointError, match="cannot be written"):
        encode(object())
    with pytest.raises(CheckpointError, match="not one that a plan may run"):
        Call("x", "operator.attrgetter.x", [], {})
