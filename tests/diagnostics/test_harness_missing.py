"""Tasks where lm-evaluation-harness is not installed."""

from __future__ import annotations

import sys

import pytest

from sparseworks.core.errors import MissingDependency
from sparseworks.diagnostics.harness import evaluate


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependency, match=r"pip install 'sparseworks\[evaluation\]'"):
        evaluate(None, None, ["arc_easy"])
