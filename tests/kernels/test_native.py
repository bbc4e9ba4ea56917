"""The native module is there where it has to be."""

from __future__ import annotations

import os

from sparseworks.kernels import available


def test_the_native_module_is_built_where_ci_runs():
    if os.environ.get("CI"):
        assert available()
