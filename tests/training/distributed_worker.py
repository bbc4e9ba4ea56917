"""What each of two processes runs for test_distributed: python distributed_worker.py FOLDER.

Started by torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); every rank writes
what it saw into FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import sparseworks as sw

STEPS = 8
METHODS = ("gradual", "rigl", "granet", "set", "static", "iss-p", "sr-ste")


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(10, 25), nn.Tanh(), nn.Linear(25, 17), nn.Tanh(), nn.Linear(17, 4)]
    return nn.Sequential(*layers).double()


def batches():
    """The whole batches; a rank takes its half."""
    g = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(8, 10, generator=g).double(), torch.randint(0, 4, (8,), generator=g)


def sparse(model: nn.Module, method: str):
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    options = {} if method in ("static", "iss-p") else {"every": 2}
    if method == "sr-ste":
        options = {"pattern": "unstructured", "decay": 0.05}
    return optimizer, sw.sparsify(model, optimizer, method, sparsity=0.7, steps=STEPS, **options)


def trained(model: nn.Module, optimizer, run, inner, rank: int = 0, ranks: int = 1):
    """Masks after every step, then the weights."""
    masks = []
    for x, y in batches():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.chunk(ranks)[rank]), y.chunk(ranks)[rank])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        masks.append({n: m.clone() for n, m in run.masks.items()})
    record = run.finish()
    weights = {n: whole(p.detach()) for n, p in inner.named_parameters()}
    return {"masks": masks, "weights": weights, "record": {n: record[n] for n in record}}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def data_parallel(method: str, rank: int, ranks: int, wrapped_first: bool):
    inner = net()
    wrapped = nn.parallel.DistributedDataParallel(inner)
    parts = sparse(wrapped if wrapped_first else inner, method)
    return trained(wrapped, *parts, inner, rank, ranks)


def fully_sharded(method: str, rank: int, ranks: int):
    from torch.distributed.fsdp import fully_shard

    model = net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    assert all(hasattr(p, "to_local") for p in model.parameters())
    parts = sparse(model, method)
    return trained(model, *parts, model, rank, ranks)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for method in METHODS:
        for first in (True, False):
            found[f"ddp {method} {first}"] = data_parallel(method, rank, ranks, first)
        found[f"fsdp {method}"] = fully_sharded(method, rank, ranks)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
