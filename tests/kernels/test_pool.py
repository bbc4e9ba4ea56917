"""Helper threads keep off the processor of their caller."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sparseworks.kernels import available

SCRIPT = """
import os, time, torch
from sparseworks.kernels import pack_mask, spmv

packed, x = pack_mask(torch.ones(512, 512)), torch.ones(512)
before = set(os.listdir("/proc/self/task"))
spmv(packed, x, threads=3)
helpers = {int(t) for t in set(os.listdir("/proc/self/task")) - before}
assert len(helpers) == 2, helpers
allowed = os.sched_getaffinity(0)
until = time.monotonic() + 30
while time.monotonic() < until:  # helpers that still run are not moved
    time.sleep(0.01)
    assert bool((spmv(packed, x, threads=3) == 512).all())
    kept_off = [allowed - os.sched_getaffinity(helper) for helper in helpers]
    if all(len(processors) == 1 for processors in kept_off):
        break
else:
    raise SystemExit(f"not kept off: {kept_off}")
os.sched_setaffinity(0, {min(allowed)})  # no other one is left: nothing changes
assert bool((spmv(packed, x, threads=3) == 512).all())
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not tell")
def test_helpers_keep_off_the_callers_processor():
    if not available() or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("no native kernels, or one processor")
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
