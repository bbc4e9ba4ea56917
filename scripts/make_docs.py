"""Write the generated pages of the documentation: the catalogue, and the results of claims and
benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from result_pages import families_page, reliability_page

import sparseworks  # noqa: F401  (registers the methods)
from sparseworks.diagnostics.claims import results, table
from sparseworks.report.catalogue import catalogue_markdown

ROOT = Path(__file__).resolve().parents[1]

CLAIMS = """# Results of the claims

Each paper's central claim in miniature, measured here. *holds*: the 95 % interval over seeds lies
above 0 in the direction the paper promises; *fails*: below, or below what was declared negligible
beforehand; *inconclusive*: it contains 0. Where a claim looks at its seeds several times, the
intervals are widened so that all looks together err in 5 %. The proposed margin does not decide.
Machine, versions and per-seed values are in `claims/*/*.json`.

"""
RESULTS = {"families": families_page, "reliability": reliability_page}


def pages() -> dict[Path, str]:
    """Path -> text of every generated page."""
    return {
        ROOT / "docs" / "catalogue.md": catalogue_markdown(),
        ROOT / "docs" / "claims.md": CLAIMS + table(ROOT / "claims"),
        # what an installed package shows, where there is no checkout
        ROOT / "src" / "sparseworks" / "diagnostics" / "results.json": json.dumps(
            results(ROOT / "claims"), indent=1
        )
        + "\n",
        **{
            ROOT / "docs" / f"{name}.md": page(json.loads(result(name).read_text()))
            for name, page in RESULTS.items()
            if result(name).is_file()
        },
    }


def result(name: str) -> Path:
    """Where a benchmark that has a page puts its figures."""
    return ROOT / "benchmarks" / "results" / f"{name}.json"


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    try:
        import mkdocs  # noqa: F401
        import mkdocstrings  # noqa: F401
    except ImportError:
        print(
            "the site was not built: mkdocs or mkdocstrings is missing (pip install -e '.[docs]')"
        )
        return
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
