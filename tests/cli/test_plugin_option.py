"""`--plugin FILE.py` in every command that runs methods by name."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparseworks as sw
import tiny_models
from sparseworks.cli import COMMANDS, main
from sparseworks.core import plugins, registry

NET = f"{tiny_models.__file__}:net"
ONE_SHOT = '''\
from dataclasses import dataclass
from typing import ClassVar

import sparseworks as sw
from sparseworks.weights.oneshot.base import OneShot


@sw.register
@dataclass(frozen=True)
class SignedSize(OneShot):
    """Keep the largest w."""

    info: ClassVar = sw.MethodInfo(
        "signed-size", "My idea", "-", 2026, "own", "one-shot", summary="the largest w"
    )

    def score(self, target, weight, evidence):
        return weight
'''
HOOKED = '''\
from dataclasses import dataclass
from typing import ClassVar

import sparseworks as sw
from sparseworks.training.method import Hooked


@sw.register
@dataclass(frozen=True)
class FirstColumns(Hooked):
    """Keep what comes first."""

    info: ClassVar = sw.MethodInfo("first-ones", "My idea", "-", 2026, "own", "hooked")

    def begin(self, run):
        for name, mask in run.masks.items():
            kept = round((1 - run.sparsity) * mask.numel())
            mask.view(-1)[kept:] = False
'''


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    held = registry.snapshot()
    monkeypatch.setattr(plugins, "_LOADED", {})
    monkeypatch.chdir(tmp_path)
    yield
    registry.restore(held)


def options_of(command: str) -> set[str]:
    module = importlib.import_module(f"sparseworks.cli.{command.replace('-', '_')}")
    return {f.name for f in dataclasses.fields(module.Options)}


def test_every_command_that_takes_methods_takes_plugins() -> None:
    taking = {c for c in COMMANDS if {"method", "methods"} & options_of(c)}
    assert taking >= {"prune", "train", "slim", "tickets", "activations", "upcycle", "compare"}
    assert {c for c in COMMANDS if "plugin" in options_of(c)} == taking | {"methods"}


@pytest.mark.parametrize("command", ["methods", "prune", "compare"])
def test_the_help_says_that_a_plugin_runs(command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "run with all your rights: name only files that you trust" in text


def test_the_catalogue_shows_them(capsys: pytest.CaptureFixture) -> None:
    Path("own.py").write_text(ONE_SHOT)
    assert main(["methods", "signed-size"]) == 1
    assert "unknown method 'signed-size'" in capsys.readouterr().err
    assert main(["methods", "--plugin", "own.py", "--json", "--room", "own"]) == 0
    [listed] = json.loads(capsys.readouterr().out)
    assert listed["command"] == (
        "sparseworks prune MODEL --method signed-size --sparsity 0.5 --out OUT"
    )


def test_prune_runs_one_and_its_options_repeat_it() -> None:
    Path("own.py").write_text(ONE_SHOT)
    words = [NET, "--method", "signed-size", "--sparsity", "0.5", "--plugin", "own.py"]
    assert main(["prune", *words, "--out", "a"]) == 0
    assert "--plugin own.py" in json.loads(Path("a/result.json").read_text())["command"]
    registry.restore(({k: v for k, v in registry.paths().items() if k != "signed-size"}, {}))
    plugins._LOADED.clear()
    assert main(["prune", "--config", "a/options.json", "--out", "b"]) == 0
    dense = tiny_models.net()[7].weight.detach()
    for folder in ("a", "b"):
        kept = sw.load(f"{folder}/model.safetensors", tiny_models.net())[7].weight.detach() != 0
        assert int(kept.sum()) == kept.numel() // 2
        assert dense[kept].min() >= dense[~kept].max()


def test_train_resumes_with_the_plugin_that_it_was_started_with() -> None:
    Path("own.py").write_text(HOOKED)
    words = [
        "train", NET, "--data", "digits", "--samples", "128", "--batch-size", "32", "--epochs", "1",
        "--no-augment", "--no-tensorboard", "--method", "first-ones", "--sparsity", "0.5",
        "--plugin", "own.py", "--out", "run",
    ]  # fmt: skip
    assert main(words) == 0
    weight = sw.load("run/model.safetensors", tiny_models.net())[7].weight.detach().view(-1)
    assert bool((weight[: len(weight) // 2] != 0).all()) and not weight[len(weight) // 2 :].any()
    Path("run/result.json").unlink()  # as if it had been killed before its end
    registry.restore(({k: v for k, v in registry.paths().items() if k != "first-ones"}, {}))
    plugins._LOADED.clear()
    assert main(["train", "--resume", "--out", "run"]) == 0
    again = sw.load("run/model.safetensors", tiny_models.net())[7].weight.detach().view(-1)
    assert bool((weight == again).all())


def test_compare_puts_them_beside_others() -> None:
    Path("own.py").write_text(ONE_SHOT)
    words = [
        "compare", NET, "--methods", "magnitude", "signed-size", "--sparsities", "0.5", "--plugin",
        "own.py", "--metric", "accuracy", "--eval-data", "digits", "--eval-samples", "64",
        "--out", "c",
    ]  # fmt: skip
    assert main(words) == 0
    rows = Path("c/compare.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["magnitude", "signed-size"]


def test_an_error_is_told_by_file_and_line(capsys: pytest.CaptureFixture) -> None:
    own = Path("own.py")
    words = ["prune", NET, "--method", "signed-size", "--sparsity", "0.5", "--plugin", "own.py"]
    own.write_text(ONE_SHOT + "\n1 / 0\n")
    assert main([*words, "--out", "out"]) == 1
    line = len(ONE_SHOT.splitlines()) + 2
    said = capsys.readouterr().err.strip()
    assert said == f"sparseworks: error: plugin {own.resolve()}:{line}: " + (
        "ZeroDivisionError: division by zero"
    )
    own.write_text(ONE_SHOT.replace("return weight", "return weigth"))
    assert main([*words, "--out", "out"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"plugin {own.resolve()}:{line - 2}: NameError: name 'weigth'" in last
    assert not Path("out").exists()
