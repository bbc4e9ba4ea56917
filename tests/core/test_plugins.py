"""Methods of others: the decorator, files, installed packages, and where each error points."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.cli import doctor
from sparseworks.core import plugins, registry
from sparseworks.core.errors import InvalidArgument
from sparseworks.report.catalogue import classes
from sparseworks.training.method import Hooked
from sparseworks.weights.oneshot.base import OneShot
from sparseworks.weights.structured.base import GroupScore

SOURCE = '''\
from dataclasses import dataclass
from typing import ClassVar

import sparseworks as sw
from sparseworks.weights.oneshot.base import OneShot


@sw.register
@dataclass(frozen=True)
class Largest(OneShot):
    """Keep the largest weights, signs counted."""

    sign: float = 1.0
    info: ClassVar = sw.MethodInfo(
        name="largest", title="t", authors="-", year=2026, room="own", kind="one-shot"
    )

    def score(self, target, weight, evidence):
        return self.sign * weight
'''


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    held, modules = registry.snapshot(), set(sys.modules)
    monkeypatch.setattr(plugins, "_LOADED", {})
    yield
    registry.restore(held)
    for name in set(sys.modules) - modules:
        if name.startswith(("sparseworks_plugin_", "a_package_of")):
            del sys.modules[name]


def info(name: str = "mine", kind: Any = "one-shot") -> sw.MethodInfo:
    return sw.MethodInfo(name=name, title="t", authors="-", year=2026, room="own", kind=kind)


def written(folder: Path, text: str = SOURCE, name: str = "own.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def test_a_registered_class_is_a_method_by_name_object_and_attribute() -> None:
    @sw.register
    @dataclass(frozen=True)
    class Mine(OneShot):
        info: ClassVar[sw.MethodInfo] = info()

        def score(self, target: Any, weight: Tensor, evidence: Any) -> Tensor:
            return -weight.abs()

    assert Mine.info.name in registry.names() and registry.resolve("mine") is Mine
    model = net()
    dense = model[0].weight.detach().clone()
    sw.prune(model, "mine", sparsity=0.5)
    kept = model[0].weight.detach() != 0
    assert int(kept.sum()) == 15
    assert dense[kept].abs().max() <= dense[~kept].abs().min()  # the smallest stay
    again = net()
    sw.prune(again, Mine(), sparsity=0.5)
    assert torch.equal(again[0].weight, model[0].weight)


def test_what_is_no_method_is_refused_and_not_registered() -> None:
    class Plain(OneShot):
        info: ClassVar[sw.MethodInfo] = info()

    @dataclass
    class Thawed:
        info: ClassVar[sw.MethodInfo] = info()

    @dataclass(frozen=True)
    class Nameless(OneShot):
        pass

    @dataclass(frozen=True)
    class Odd(OneShot):
        info: ClassVar[sw.MethodInfo] = info(kind="sparse")

    @dataclass(frozen=True)
    class Other(OneShot):
        info: ClassVar[sw.MethodInfo] = info(kind="hooked")

    @dataclass(frozen=True)
    class Spaced(Hooked):
        info: ClassVar[sw.MethodInfo] = info("a b", "hooked")

    @dataclass(frozen=True)
    class Unwritten(GroupScore):
        info: ClassVar[sw.MethodInfo] = info(kind="structured")

    @dataclass(frozen=True)
    class Asking(Hooked):
        share: float
        info: ClassVar[sw.MethodInfo] = info(kind="hooked")

    @dataclass(frozen=True)
    class Wanda(OneShot):
        info: ClassVar[sw.MethodInfo] = info("wanda")

    before = registry.names()
    for cls, said in (
        (len, "no class"),
        (Plain, "no dataclass"),
        (Thawed, "not frozen"),
        (Nameless, "has no `info"),
        (Odd, "info.kind is 'sparse'; one of 'one-shot'"),
        (Other, "from sparseworks.training.method import Hooked"),
        (Spaced, "without spaces"),
        (Unwritten, "lacks the function 'score'"),
        (Asking, "option 'share' has no default"),
        (Wanda, "'wanda' is taken by sparseworks.weights.oneshot.wanda:Wanda"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            sw.register(cls)  # type: ignore[type-var]
        assert said in str(caught.value), cls
    assert registry.names() == before
    assert registry.resolve("wanda").__module__ == "sparseworks.weights.oneshot.wanda"


def test_a_file_is_loaded_once_and_again_after_a_change(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert sw.load_plugin(path) == ("largest",)
    first = registry.resolve("largest")
    assert sw.load_plugin(str(path)) == ("largest",) and registry.resolve("largest") is first
    model = net()
    sw.prune(model, "largest", sparsity=0.5, sign=-1.0)
    dense = net()[0].weight.detach()
    kept = model[0].weight.detach() != 0
    assert dense[kept].max() <= dense[~kept].min()
    written(tmp_path, SOURCE.replace('"largest"', '"greatest"'))
    assert sw.load_plugin(path) == ("greatest",)
    assert "largest" not in registry.names() and registry.resolve("greatest") is not first


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("x = 1\ny = (\n", ":2", "SyntaxError"),
        ("x = 1\n\nraise ValueError('no')\n", ":3", "ValueError: no"),
        ("import nowhere_at_all\n", ":1", "ModuleNotFoundError"),
        ("def f():\n    return 1 / 0\n\nf()\n", ":2", "ZeroDivisionError"),
        (SOURCE.replace('"largest"', '"wanda"'), ":8", "the name 'wanda' is taken"),
        (SOURCE.replace("frozen=True", "eq=True"), ":9", "cannot inherit non-frozen"),
        (SOURCE.replace("@sw.register\n", ""), "", "put @sw.register above"),
    ],
)
def test_a_bad_file_is_told_by_file_and_line_and_leaves_nothing(
    tmp_path: Path, text: str, place: str, said: str
) -> None:
    good = written(tmp_path)
    sw.load_plugin(good)
    before, first = registry.names(), registry.resolve("largest")
    for path in (written(tmp_path, text, "bad.py"), written(tmp_path, text)):
        with pytest.raises(InvalidArgument) as caught:
            sw.load_plugin(path)
        assert f"{path}{place}" in str(caught.value) and said in str(caught.value)
        assert registry.names() == before and registry.resolve("largest") is first


def test_what_is_no_python_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.py", tmp_path, written(tmp_path, SOURCE, "own.txt")):
        with pytest.raises(InvalidArgument, match="no such file"):
            sw.load_plugin(path)


def test_two_files_do_not_take_each_others_names(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    sw.load_plugin(written(tmp_path))
    first = registry.resolve("largest")
    with pytest.raises(InvalidArgument, match="is taken by sparseworks_plugin_own"):
        sw.load_plugin(written(tmp_path / "other"))
    assert registry.resolve("largest") is first


@pytest.mark.parametrize(
    ("score", "said"), [("weight.sum(-1)", r"shape \[1, 5\]"), ("float(weight.sum())", "a float")]
)
def test_scores_of_another_shape_are_refused_by_name(tmp_path: Path, score: str, said: str) -> None:
    sw.load_plugin(written(tmp_path, SOURCE.replace("weight\n", f"{score}\n")))
    model = net()
    before = model[0].weight.detach().clone()
    with pytest.raises(InvalidArgument, match=rf"'largest': score returned {said} for 0.weight"):
        sw.prune(model, "largest", sparsity=0.5)
    assert torch.equal(model[0].weight, before)


def test_scores_of_too_few_groups_are_refused() -> None:
    @sw.register
    @dataclass(frozen=True)
    class Short(GroupScore):
        info: ClassVar[sw.MethodInfo] = info("short", "structured")

        def score(self, model: Any, coupling: Any, data: Any, loss: Any) -> Any:
            return torch.ones(coupling.count - 1).double().numpy()

    model = net().eval()
    with pytest.raises(
        InvalidArgument, match=r"score returned shape \[5\]; one number for each of"
    ):
        sw.slim(model, torch.randn(4, 6), params=0.6, method="short")
    assert model[0].weight.shape == (5, 6)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install packages: (module name, its text, its entry points) -> on the path, as pip does."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(module: str, text: str, points: str) -> None:
        (tmp_path / f"{module}.py").write_text(text)
        meta = tmp_path / f"{module}-1.0.dist-info"
        meta.mkdir()
        (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (meta / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{points}\n")
        importlib.invalidate_caches()
        monkeypatch.setattr(registry, "_looked", [])
        monkeypatch.setattr(registry, "_PACKAGES", {})

    return install


def test_an_installed_package_brings_methods_and_is_imported_when_used(installed: Any) -> None:
    installed("a_package_of_mine", SOURCE, "largest = a_package_of_mine:Largest")
    assert "largest" in registry.names() and "a_package_of_mine" not in sys.modules
    result = sw.prune(net(), "largest", sparsity=0.5)
    assert result.method == "largest" and "a_package_of_mine" in sys.modules


@pytest.mark.parametrize(
    ("text", "points", "said"),
    [
        ("x = 1\n1 / 0\n", "largest = {m}:Largest", "{m}.py:2: ZeroDivisionError"),
        ("x = 1\n", "largest = {m}:Largest", "{m}.py has no 'Largest'"),
        ("class Largest:\n    pass\n", "largest = {m}:Largest", "is no dataclass"),
        (SOURCE, "biggest = {m}:Largest", "its info.name is 'largest'"),
    ],
)
def test_a_broken_package_is_named(installed: Any, text: str, points: str, said: str) -> None:
    module = "a_package_of_trouble"
    installed(module, text, points.format(m=module))
    name = points.split()[0]
    assert name in registry.names()
    with pytest.raises(InvalidArgument) as caught:
        registry.resolve(name)
    assert f"method {name!r} of the installed package {module}" in str(caught.value)
    assert said.format(m=module) in str(caught.value)
    with pytest.warns(UserWarning, match=module):  # the catalogue has all others
        listed = {cls.info.name for cls in classes()}
    assert listed == set(registry.names()) - {name}
    assert doctor.found()["methods"]["of packages"] == {name: module}
    assert any(module in note for note in doctor.found()["notes"])
    assert registry.resolve("wanda").info.name == "wanda"


def test_a_package_does_not_take_a_name_of_the_house(installed: Any) -> None:
    installed("a_package_of_greed", SOURCE, "wanda = a_package_of_greed:Largest")
    with pytest.warns(UserWarning, match="a_package_of_greed brings a method 'wanda'"):
        registry.names()
    assert registry.resolve("wanda").__module__ == "sparseworks.weights.oneshot.wanda"
