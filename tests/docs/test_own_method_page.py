"""The page docs/own-method.md: its blocks run, in their order, in one empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from sparseworks.cli.new_method import Options
from sparseworks.core import plugins, registry
from sparseworks.core.kinds import KINDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "own-method.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder, with `sparseworks` and `pytest` of this Python first on the path."""
    held = registry.snapshot()
    monkeypatch.setattr(plugins, "_LOADED", {})
    (tools := tmp_path / "bin").mkdir()
    for name in ("sparseworks", "pytest"):
        script = tools / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {name} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    (work := tmp_path / "work").mkdir()
    monkeypatch.chdir(work)
    yield work
    registry.restore(held)


def test_the_page_runs_as_it_stands(folder: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    said = ""
    for language, text in BLOCKS:
        if language == "sh":
            ran = subprocess.run(["bash", "-euc", text], capture_output=True, text=True)
            said = ran.stdout + ran.stderr
            assert ran.returncode == 0, f"{text}\n{said}"
        elif language == "text":
            assert text.strip() in said.replace(f"{folder}/", "")
        elif language == "python" and (file := re.match(r"# (\w+\.py)\n", text)):
            Path(file[1]).write_text(text.removeprefix(file[0]))
        elif language == "python":
            exec(compile(text, f"own-method.md: {text.splitlines()[0]}", "exec"), names)
    for made in ("out/weighted/report.html", "out/compare/compare.csv", "out/schedule/result.json"):
        assert (folder / made).is_file(), made
    assert "power=0.7" in (folder / "out/weighted/result.json").read_text()


def test_every_block_is_of_a_kind_that_is_tried() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "sh", "text", "toml"}
    assert PAGE.count("```") == 2 * len(BLOCKS)


def test_its_table_is_that_of_the_command() -> None:
    kinds = get_args(get_type_hints(Options)["kind"])
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| `sw\.(\w+)` \| `(sparseworks \w+)` \|$", PAGE, re.M)
    assert [kind for kind, _, _ in rows] == list(kinds)
    for kind, call, command in rows:
        assert KINDS[kind].call.startswith(f"sw.{call}(")  # type: ignore[index]
        assert KINDS[kind].command.startswith(command)  # type: ignore[index]


def test_the_group_of_entry_points_is_the_one_that_is_read() -> None:
    [text] = [text for language, text in BLOCKS if language == "toml"]
    [points] = tomllib.loads(text)["project"]["entry-points"].items()
    assert points[0] == registry.GROUP and list(points[1]) == ["weighted"]
