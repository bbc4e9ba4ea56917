"""Generated pages are up to date."""

from __future__ import annotations

from pathlib import Path

from sparseworks.diagnostics import claims
from sparseworks.diagnostics.claims import table
from sparseworks.report.catalogue import catalogue_markdown

ROOT = Path(__file__).resolve().parents[2]


def test_the_catalogue_is_the_registry():
    assert (ROOT / "docs" / "catalogue.md").read_text() == catalogue_markdown()


def test_the_package_carries_the_results():
    assert claims.results(ROOT / "nowhere") == claims.results(ROOT / "claims")


def test_the_table_of_claims_is_the_results():
    assert (ROOT / "docs" / "claims.md").read_text().endswith(table(ROOT / "claims"))
