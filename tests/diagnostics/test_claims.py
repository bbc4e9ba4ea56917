"""The harness: judging, resuming, recording."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparseworks.cli.claims import Options
from sparseworks.cli.claims import run as cli_run
from sparseworks.core.errors import InvalidArgument
from sparseworks.diagnostics import claims

FILE = """
from pathlib import Path
from sparseworks.diagnostics.claims import Claim, Promise
LOG = Path(__file__).parent / "log"
def measure(seed, setting):
    with LOG.open("a") as log:
        log.write(f"{seed}\\n")
    return {"up": 1.0 + 0.1 * seed, "down": -1.0 - 0.1 * seed, "unclear": (-1) ** seed, "n": 2}
CLAIM = Claim("x01", "none", "t", "m", "d", "b", "k",
    tuple(Promise(n, n, 0.5) for n in ("up", "down", "unclear")) + (Promise("n", "n", exact=True),),
    measure)
"""


@pytest.fixture
def claim(tmp_path):
    path = tmp_path / "claims" / "weights" / "a01_test.py"
    path.parent.mkdir(parents=True)
    path.write_text(FILE.replace("x01", "a01"))
    return path


def test_verdicts_follow_the_interval(claim, tmp_path):
    result = claims.run(claim, runs=tmp_path / "runs")
    verdicts = {p["name"]: p["verdict"] for p in result["promises"]}
    assert verdicts == {
        "up": "holds", "down": "fails", "unclear": "inconclusive", "n": "holds",
    }  # fmt: skip
    assert result["verdict"] == "mixed"
    assert json.loads(claim.with_suffix(".json").read_text()) == result
    assert result["promises"][0]["reaches_margin"] and not result["promises"][1]["reaches_margin"]
    table = claims.table(tmp_path / "claims")
    assert "**holds**" in table and "**inconclusive**" in table


def test_processor_time_is_recorded_beside_the_clock(claim, tmp_path):
    source = claim.read_text().replace("    return", "    work()\n    return")
    claim.write_text(
        """
import time
def work():
    time.sleep(0.1)
    start = time.process_time()
    while time.process_time() < start + 0.05:
        pass
"""
        + source
    )
    result = claims.run(claim, runs=tmp_path / "runs", seeds=(0, 1))
    assert 0.1 <= result["cpu_seconds"] <= result["seconds"] - 0.15
    for kept in (tmp_path / "runs").glob("*/0.json"):  # as recorded before there was the figure
        values = json.loads(kept.read_text())
        del values["cpu_seconds"]
        kept.write_text(json.dumps(values))
    assert claims.run(claim, runs=tmp_path / "runs", seeds=(0, 1))["cpu_seconds"] is None


def test_finished_seeds_are_not_measured_again(claim, tmp_path):
    claims.run(claim, runs=tmp_path / "runs", seeds=(0, 1))
    claims.run(claim, runs=tmp_path / "runs", seeds=(0, 1, 2))
    assert (claim.parent / "log").read_text().split() == ["0", "1", "2"]
    claims.run(claim, runs=tmp_path / "runs", seeds=(0,), setting="full")
    assert (claim.parent / "log").read_text().split() == ["0", "1", "2", "0"]


def test_looks_stop_when_every_promise_is_decided(claim, tmp_path):
    text = claim.read_text().replace("    measure)", "    measure, looks=(3, 5, 8))")
    claim.write_text(text)
    result = claims.run(claim, runs=tmp_path / "runs")  # "unclear" alternates: never decided
    assert list(result["seeds"]) == [str(s) for s in range(8)] and result["looks"] == [3, 5, 8]
    seen = {p["name"]: p["seeds"] for p in result["promises"]}
    assert seen == {"up": 3, "down": 3, "unclear": 8, "n": 8}
    claim.write_text(text.replace("0.5) for", "0.5, negligible=9.0) for"))
    again = claims.run(claim, runs=tmp_path / "runs")
    assert {p["name"]: p["verdict"] for p in again["promises"]}["unclear"] == "fails"
    assert list(again["seeds"]) == ["0", "1", "2"]
    assert len((claim.parent / "log").read_text().split()) == 8  # judged anew, not measured
    given = claims.run(claim, runs=tmp_path / "runs", seeds=(4, 5))
    assert list(given["seeds"]) == ["4", "5"] and given["looks"] == []


def test_results_of_an_earlier_version_are_told(claim, tmp_path, capsys):
    claims.run(claim, runs=tmp_path / "runs")
    options = Options("list", folder=tmp_path / "claims")
    cli_run(options)
    assert "outdated" not in capsys.readouterr().out
    claim.write_text(claim.read_text().replace("    measure)", "    measure, version=2)"))
    cli_run(options)
    assert "a01  mixed, outdated" in capsys.readouterr().out


def test_every_claim_of_the_project_loads_and_names_its_method():
    import sparseworks  # noqa: F401
    from sparseworks.core import registry

    root = Path(__file__).resolve().parents[2] / "claims"
    found = claims.find_claims(root)
    assert found
    for card, path in found.items():
        loaded = claims.load_claim(path)
        assert loaded.card == card and loaded.method in registry.names()


def test_no_claims_here(tmp_path):
    with pytest.raises(InvalidArgument, match="checkout"):
        claims.find_claims(tmp_path / "none")
