"""The sequential rule, by simulation: it errs in 5 % at most, and finds what there is to find."""

from __future__ import annotations

import math
import random

import pytest

from sparseworks.core.errors import InvalidArgument
from sparseworks.diagnostics.judging import ERROR, LOOKS, judge, levels

DRAWS = 4000


def _shares(effect: float, looks, negligible: float | None = None) -> dict[str, float]:
    """Share of each verdict over many claims of unit normal noise."""
    rng = random.Random(1)
    counts = {"holds": 0, "fails": 0, "inconclusive": 0}
    for _ in range(DRAWS):
        values = [rng.gauss(effect, 1) for _ in range(looks[-1])]
        counts[judge(values, looks=looks, negligible=negligible).verdict] += 1
    return {name: count / DRAWS for name, count in counts.items()}


@pytest.mark.parametrize("looks", [LOOKS, (5, 10, 20), (4, 8)])
def test_coverage_under_the_null(looks):
    shares = _shares(0.0, looks)
    noise = 3 * math.sqrt(ERROR * (1 - ERROR) / DRAWS)
    assert shares["holds"] + shares["fails"] <= ERROR + noise
    assert shares["holds"] + shares["fails"] >= ERROR / 2  # wide, but not for nothing
    assert abs(shares["holds"] - shares["fails"]) <= noise


def test_looks_without_wider_intervals_would_err_more():
    rng = random.Random(2)
    wrong = 0
    for _ in range(DRAWS):
        values = [rng.gauss(0, 1) for _ in range(12)]
        wrong += any(judge(values[:n]).verdict != "inconclusive" for n in LOOKS)
    assert wrong / DRAWS > 1.5 * ERROR


def test_power():
    assert _shares(1.5, LOOKS)["holds"] > 0.9
    assert _shares(-1.5, LOOKS)["fails"] > 0.9


def test_a_negligible_effect_fails_and_a_real_one_seldom_does():
    assert _shares(0.0, LOOKS, negligible=1.5)["fails"] > 0.9
    noise = 3 * math.sqrt(ERROR / 2 / DRAWS)
    assert _shares(1.5, LOOKS, negligible=1.5)["fails"] <= ERROR / 2 + noise


def test_direction_comes_before_size():
    assert judge([0.5, 0.51, 0.52], negligible=1.0).verdict == "holds"
    assert judge([0.5, -0.5, 0.1, -0.1], negligible=1.0).verdict == "fails"
    assert judge([0.5, -0.5, 0.1, -0.1]).verdict == "inconclusive"


def test_the_first_look_that_decides_is_kept():
    values = [1.0, 1.01, 0.99, -50.0, 60.0]
    found = judge(values, looks=(3, 5))
    assert found.verdict == "holds" and found.seeds == 3
    assert found.mean == pytest.approx(1.0)
    assert judge(values[:4], looks=(3, 5)).seeds == 3  # between looks nothing is judged
    assert judge([0.0, 1.0], looks=(3, 5)).verdict == "inconclusive"


def test_exact_promises_are_refuted_by_one_value():
    assert judge([1.0, 2.0], exact=True).verdict == "holds"
    assert judge([1.0, 0.0], exact=True).verdict == "fails"
    assert judge([1.0, -1.0], exact=True).verdict == "fails"


def test_levels_spend_what_is_allowed():
    for looks in (LOOKS, (2,), (5, 6, 100)):
        assert sum(1 - level for level in levels(looks)) == pytest.approx(ERROR)
    assert levels((7,)) == (0.95,)
    for wrong in ((), (1, 3), (3, 3), (5, 3)):
        with pytest.raises(InvalidArgument, match="rising"):
            levels(wrong)
