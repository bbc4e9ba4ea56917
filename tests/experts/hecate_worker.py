"""What each of four processes runs for test_hecate: python hecate_worker.py FOLDER.

Started by torchrun's environment; every rank writes what it saw into FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.experts.layers import MoE
from sparseworks.experts.sharded import ShardedExperts
from sparseworks.models.zoo import FeedForward

STEPS, SIZE, EXPERTS, WIDTH, TOKENS = 10, 4, 8, 16, 12


class Block(nn.Module):
    """Two MLPs that become mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = FeedForward(WIDTH, 32), FeedForward(WIDTH, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        out: Tensor = x + self.two(x)
        return out


def mixture(method: str, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Block()
    run = sw.upcycle(model, method, experts=EXPERTS, start="fresh", balance=0.0, **options)
    return model, run


def shard(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """What a rank sees in a step."""
    g = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(1, TOKENS, WIDTH, generator=g), torch.randn(1, TOKENS, WIDTH, generator=g)


def random_placement(home: Tensor, step: int) -> Tensor:
    g = torch.Generator().manual_seed(step)
    return home | (torch.rand(home.shape, generator=g) < 0.4)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    x, y = shard(step, rank)
    return (model(x) - y).square().mean()


def averaged(grads: list[Tensor]) -> Tensor:
    """The mean over ranks, summed in fp64."""
    total = torch.stack([g.double() for g in grads]).sum(0) / len(grads)
    return total.to(grads[0].dtype)


def sharded(rank: int, plan: str, **options: Any) -> dict[str, Any]:
    """Train with experts on four processes."""
    model, run = mixture("hecate", **options)
    banks = [m.experts for m in model.modules() if isinstance(m, MoE)]
    assert all(isinstance(b, ShardedExperts) for b in banks)
    own = {id(p) for b in banks for p in b.parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    copies, sizes = [], []
    if plan == "forecast":
        run.attach(optimizer)
    for step in range(STEPS):
        for b in banks:
            if plan == "random":
                b.placement = random_placement(b.home, step)
            copies.append(int((b.placement & ~b.home).sum()))
            sizes.append(sum(p[0].numel() for p in b.parameters()))
        optimizer.zero_grad()
        loss_of(model.train(), step, rank).backward()
        for p in model.parameters():
            if id(p) not in own:
                parts = [torch.empty_like(p) for _ in range(SIZE)]
                dist.all_gather(parts, p.grad)
                p.grad = averaged(parts)
        optimizer.step()
    bytes_ = [(b.gathered, b.reduced) for b in banks]
    held = [sum(p.numel() for p in b.parameters()) for b in banks]
    run.finish()
    return {"state": dict(model.state_dict()), "copies": copies, "sizes": sizes, "bytes": bytes_,
            "held": held}  # fmt: skip


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seen = {
        "random": sharded(rank, "random", per_node=2),
        "kept": sharded(rank, "random", per_node=2, keep=True),
        "forecast": sharded(rank, "forecast", slots=1, overlap=3),
        "rounded": sharded(rank, "random", exact=False),
    }
    torch.save(seen, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("LOCAL_WORLD_SIZE", "4")
    main(Path(sys.argv[1]))
