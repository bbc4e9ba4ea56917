"""Every block of every how-to guide runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted((DOCS / "how-to").glob("*.md"))
NEEDS = {
    "formats": ("transformers", "compressed_tensors", "onnxscript"),
    "cpu": ("torchvision",),
    "train-sparse": ("sklearn",),
    "shell": ("sklearn",),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_runs_as_it_stands(
    page: Path, run_page: Callable[[Path], None], blocks_of: Callable[[Path], list[tuple[str, str]]]
) -> None:
    for package in NEEDS.get(page.stem, ("transformers",)):
        pytest.importorskip(package)
    blocks = blocks_of(page)
    # console: shown, and not run here, for what it needs
    assert {language for language, _ in blocks} <= {"python", "sh", "text", "console"}
    assert page.read_text().count("```") == 2 * len(blocks)
    run_page(page)


def test_the_pages_are_in_the_site() -> None:
    listed = (DOCS.parent / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f"how-to/{page.name}" in listed, page.name
