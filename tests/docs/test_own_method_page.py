"""The page docs/own-method.md: its blocks run, in their order, in one empty folder."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

from sparseworks.cli.new_method import Options
from sparseworks.core import registry
from sparseworks.core.kinds import KINDS

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "docs" / "own-method.md"
PAGE = PATH.read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_runs_as_it_stands(folder: Path, run_page: Callable[[Path], None]) -> None:
    run_page(PATH)
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
