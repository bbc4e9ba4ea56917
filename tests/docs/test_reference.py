"""The pages of docs/api/: every public name once, each the object that it says."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparseworks as sw

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
TEXT = "\n".join(page.read_text() for page in PAGES)


def test_every_public_name_stands_there_once() -> None:
    listed = re.findall(r"^## sw\.(\w+)$", TEXT, re.M)
    assert sorted([*listed, "__version__"]) == sorted(sw.__all__)


def test_every_entry_is_the_object_of_its_heading() -> None:
    entries = re.findall(r"^## sw\.(\w+)\n\n::: (\S+)$", TEXT, re.M)
    assert len(entries) == TEXT.count("\n::: ")
    for name, path in entries:
        value = getattr(sw, name)
        if path == getattr(value, "__name__", ""):  # a module
            continue
        module, _, leaf = path.rpartition(".")
        assert getattr(importlib.import_module(module), leaf) is value, name


def test_every_page_is_in_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert f"api/{page.name}" in site, page.name


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    for package in ("mkdocs", "mkdocstrings", "material"):
        pytest.importorskip(package)
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "site" / "api" / "prune" / "index.html").read_text()
    assert "calibration" in page and "sparsity" in page
