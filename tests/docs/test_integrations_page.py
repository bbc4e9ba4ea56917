"""The page docs/integrations.md: the blocks of each section run where its libraries are there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))


@pytest.mark.parametrize("title", SECTIONS)
def test_the_section_runs_as_it_stands(
    title: str, run_page: Callable[[Path], None], folder: Path
) -> None:
    text = SECTIONS[title]
    [needed] = re.findall(r"<!-- needs: (.*) -->", text)
    for package in needed.split():
        pytest.importorskip(package)
    page = folder.parent / "section.md"
    page.write_text(text)
    run_page(page)


def test_every_tool_of_the_table_is_a_name_of_the_surface() -> None:
    import sparseworks as sw

    names = set(re.findall(r"`sw\.(\w+)", PAGE.read_text()))
    assert names and names <= set(dir(sw))
