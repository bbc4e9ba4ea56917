"""Two processes train together: the same masks on both, at every step, and those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without torch.distributed"
)
WORKER = Path(__file__).with_name("distributed_worker.py")
sys.path.insert(0, str(WORKER.parent))

from distributed_worker import METHODS, net, sparse, trained  # noqa: E402


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(WORKER), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{i}.pt", weights_only=True) for i in (0, 1)]


def alone(method):
    model = net()
    return trained(model, *sparse(model, method), model)


@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_ddp_has_the_masks_of_one_process_on_every_rank(method, wrapped_first, ranks):
    check(ranks, f"ddp {method} {wrapped_first}", method)


@pytest.mark.parametrize("method", METHODS)
def test_fsdp2_has_the_masks_of_one_process_on_every_rank(method, ranks):
    check(ranks, f"fsdp {method}", method)


def check(ranks, key, method):
    one = alone(method)
    assert len(one["masks"]) > 0
    for seen in (r[key] for r in ranks):
        for step, masks in enumerate(one["masks"]):
            for name, mask in masks.items():
                assert torch.equal(seen["masks"][step][name], mask), (step, name)
        for name, weight in one["weights"].items():
            torch.testing.assert_close(seen["weights"][name], weight, rtol=1e-9, atol=1e-11)
            if name in seen["record"]:
                assert bool((seen["weights"][name][~seen["record"][name]] == 0).all())
    first, second = (r[key]["weights"] for r in ranks)
    assert all(torch.equal(first[n], second[n]) for n in first)
