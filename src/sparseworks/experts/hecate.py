"""Hecate, fully sharded sparse data parallelism (Qing et al. 2025, Hecate: Unlocking Efficient
Sparse Model Training via Fully Sharded Sparse Data Parallelism, arXiv:2502.02581).

Every expert has its weights and optimizer state on one device, P. For a step, copies of the experts
that are expected to be overloaded go to other devices, P' (`hecate_plan.materialize`):

    forward    weights from P to P' (a sparse all-gather), tokens to the nearest holder
    backward   the same weights again, unless they are kept; gradients from P' home, summed
    update     at home alone

of (P' - P) |expert| bytes each. P' follows from the mean load of the last `window` steps.

Numbers are those of plain data parallelism: each device sends all its tokens of an expert to one
holder, which multiplies those of each device on their own, and sums of gradients are taken in fp64
(`exact`), where they do not depend on the order, then divided by the devices, as DDP averages. They
agree to the last bit where a row of inputs takes a multiple of 64 bytes; elsewhere the products of
libraries round by where a row lies. `exact=False` sums in the type of the weights and sends half as
much.

The other parameters are the caller's to average (DDP: ignore those of the experts). The optimizer
of each process holds its own experts; `finish` puts all of them back on every one. Without a
process group this is plain upcycling. Homes stay where they are: `hecate_plan.reshard` plans other
ones, `hecate_costs` tells what they would save. No code was published.

By its arithmetic (claim 177: 32 experts on 8 devices, Zipf 1.2, two slots) a step is 2.5 times as
fast as with experts at home, and 2.2 to 3.6 times with the loads of a real router. Where loads are
even it is a tenth slower, as copies then upset the balance (set `slots=0`), and with a tenth of the
bandwidth the same plan takes twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.registry import MethodInfo
from sparseworks.experts.copying import Upcycling
from sparseworks.experts.hecate_plan import forecast, materialize
from sparseworks.experts.method import Job
from sparseworks.experts.sharded import ShardedExperts

__all__ = ["Hecate"]


@dataclass(frozen=True)
class Hecate(Upcycling):
    """Upcycling whose experts are spread over the processes of torch.distributed.

    Args:
        overlap: t, experts whose copy hides behind other work.
        slots: m, copies that a process has memory for.
        window: past steps that the forecast is the mean of.
        keep: hold copies until the backward pass, instead of sending them twice.
        exact: sum gradients in fp64.
        per_node: processes of a node; None: LOCAL_WORLD_SIZE, or all.
    """

    overlap: int = 8
    slots: int = 2
    window: int = 5
    keep: bool = False
    exact: bool = True
    per_node: int | None = None

    info: ClassVar[MethodInfo] = MethodInfo(
        name="hecate",
        title="Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse Data "
        "Parallelism",
        authors="Qing et al.",
        year=2025,
        card="177",
        room="experts",
        kind="mixture",
        pattern="experts of a token, and of a process",
        budget="top-k of each token; slots for copies",
        tensors="MLPs",
        cost="training on several processes; weights of copied experts are sent twice a step",
        summary="experts live on one process each; overloaded ones are copied for a step",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.overlap, self.slots) < 0 or self.window < 1:
            raise InvalidArgument("overlap and slots from 0, window from 1")
        if self.per_node is not None and self.per_node < 1:
            raise InvalidArgument(f"per_node={self.per_node} must be at least 1")

    def begin(self, job: Job) -> None:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        if self.experts % dist.get_world_size():
            raise ModelError(
                f"{self.experts} experts do not divide among {dist.get_world_size()} processes"
            )
        for layer in job.layers.values():
            layer.experts = ShardedExperts(
                layer.experts, per_node=self.per_node, keep=self.keep, exact=self.exact
            )
        job.own["loads"] = {name: [] for name in job.layers}

    def update(self, job: Job) -> None:
        for name, layer in job.layers.items():
            bank = layer.experts
            if not isinstance(bank, ShardedExperts) or layer.routing is None:
                continue
            load = layer.routing.wanted.reshape(-1, bank.count).sum(0).double().cpu()
            dist.all_reduce(load, group=bank.group)
            past = job.own["loads"][name]
            past.append(load)
            del past[: -self.window]
            bank.placement = materialize(
                bank.home, forecast(past, self.window), overlap=self.overlap, slots=self.slots,
                per_node=bank.per_node,
            )  # fmt: skip

    def finish(self, job: Job) -> None:
        for layer in job.layers.values():
            if isinstance(layer.experts, ShardedExperts):
                layer.experts = layer.experts.whole()
        job.own.pop("loads", None)
