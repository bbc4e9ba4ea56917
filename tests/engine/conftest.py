"""What tests of the engine share."""

from __future__ import annotations

import pytest

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.native import instruction_set


@pytest.fixture
def force_isa(monkeypatch):
    """Run on an instruction set by its name; the test is skipped where the processor lacks it."""

    def forced(name):
        monkeypatch.setenv("SPARSEWORKS_ISA", name)
        try:
            instruction_set()
        except InvalidArgument as reason:
            pytest.skip(str(reason))

    return forced
