"""What is round an ONNX export: the file whole or as it was, the model and the logger as they were.

The exporter itself is torch's; the tests of slimming run it where it is installed.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from sparseworks.core.errors import MissingDependency
from sparseworks.io.onnx import export_onnx, onnx_session

INPUTS = {"tensor": torch.zeros(2, 3), "mapping": {"input": torch.zeros(2, 3)}}
LOGGER = logging.getLogger("torch.onnx")


class Exporter:
    """In place of torch's: notes what it is given and writes files of the names it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...] = ()) -> None:
        self.more, self.seen = more, []
        monkeypatch.setitem(sys.modules, "onnxscript", ModuleType("onnxscript"))
        monkeypatch.setattr(torch.onnx, "export", self.export)

    def export(self, model: nn.Module, args: Any, *, kwargs: Any = None, **_: Any) -> Exporter:
        self.seen.append((model.training, LOGGER.level, model(*args, **(kwargs or {})).shape))
        return self

    def save(self, path: str) -> None:
        for name in ("", *self.more):
            Path(path + name).write_text("new")


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("more", [(), (".data",)])
def test_all_files_appear_and_everything_is_as_it_was(tmp_path, monkeypatch, inputs, more):
    exporter = Exporter(monkeypatch, more)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout()) if inputs == "tensor" else nn.Linear(3, 4)
    model.train()
    model[-1].eval() if inputs == "tensor" else None
    before, level = [m.training for m in model.modules()], LOGGER.level
    path = tmp_path / "m.onnx"
    path.write_text("old")
    assert export_onnx(model, INPUTS[inputs], path) == path
    assert exporter.seen == [(False, logging.ERROR, (2, 4))]
    assert [m.training for m in model.modules()] == before and LOGGER.level == level
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "m.onnx" + name: "new" for name in ("", *more)
    }


def test_an_export_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    exporter = Exporter(monkeypatch)
    model, path, level = nn.Linear(3, 4), tmp_path / "m.onnx", LOGGER.level
    path.write_text("old")
    monkeypatch.setattr(exporter, "more", ("/not a folder",))
    with pytest.raises(ValueError, match="cannot be written"):
        export_onnx(model, INPUTS["tensor"], path)
    with pytest.raises(RuntimeError):
        export_onnx(model, torch.zeros(2, 5), path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    assert model.training and LOGGER.level == level


def test_packages_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match="onnxscript"):
        export_onnx(nn.Linear(3, 4), INPUTS["tensor"], tmp_path / "m.onnx")
    with pytest.raises(MissingDependency, match="onnxruntime"):
        onnx_session(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
