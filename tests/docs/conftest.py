"""Pages of the documentation whose blocks run, in their order, in one empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparseworks.core import plugins, registry

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder, with `sparseworks` and `pytest` of this Python first on the path."""
    held = registry.snapshot()
    monkeypatch.setattr(plugins, "_LOADED", {})
    (tools := tmp_path / "bin").mkdir()
    commands = {"sparseworks": "sparseworks", "pytest": "pytest"}
    commands |= {"torchrun": "torch.distributed.run", "python": ""}
    for name, module in commands.items():
        script = tools / name
        run = f"-m {module} " if module else ""
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {run}"$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    (work := tmp_path / "work").mkdir()
    monkeypatch.chdir(work)
    (home := tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(home))
    yield work
    registry.restore(held)


@pytest.fixture
def run_page(folder: Path) -> Callable[[Path], None]:
    """Runs a page: Python in one namespace, or into the file that its first line names; shell
    commands; and `text`, which the command before it says."""

    def run(page: Path) -> None:
        names: dict[str, object] = {"__name__": "page"}
        said = ""
        for language, text in _BLOCK.findall(page.read_text()):
            if language == "sh":
                ran = subprocess.run(["bash", "-euc", text], capture_output=True, text=True)
                said = ran.stdout + ran.stderr
                assert ran.returncode == 0, f"{text}\n{said}"
            elif language == "text":
                assert text.strip() in said.replace(f"{folder}/", "")
            elif language == "python" and (file := re.match(r"# (\w+\.py)\n", text)):
                Path(file[1]).write_text(text.removeprefix(file[0]))
            elif language == "python":
                exec(compile(text, f"{page.name}: {text.splitlines()[0]}", "exec"), names)

    return run


@pytest.fixture
def blocks_of() -> Callable[[Path], list[tuple[str, str]]]:
    """Language and text of the blocks of a page."""
    return lambda page: _BLOCK.findall(page.read_text())
