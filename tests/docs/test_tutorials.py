"""Every block of every tutorial runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_runs_as_it_stands(
    page: Path, run_page: Callable[[Path], None], blocks_of: Callable[[Path], list[tuple[str, str]]]
) -> None:
    blocks = blocks_of(page)
    assert {language for language, _ in blocks} == {"python", "sh"}
    assert page.read_text().count("```") == 2 * len(blocks)
    run_page(page)
