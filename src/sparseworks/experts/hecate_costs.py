"""What a step of expert parallelism costs on a cluster, by arithmetic (Qing et al. 2025).

    time = max over devices of tokens * seconds_per_token
         + rounds * max over devices of token bytes in or out / bandwidth
         + max(0, expert bytes in or out / bandwidth - hidden) for each gather or reduction

with the slower links for what crosses nodes. Work outside the mixture is `hidden`: it can cover
copies, and is in no arm's time. Arms:

    "ep"         experts stay at home
    "rearrange"  every `period` steps homes are chosen anew by the forecast, the most loaded expert
                 to the least loaded device that has a place; weights and optimizer state move
    "replicate"  all experts are copied everywhere in every step
    "fssdp"      sparse materialisation (`hecate_plan`); with `reshard`, homes chosen anew too
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.experts.hecate_plan import (
    even_dispatch,
    forecast,
    homes,
    materialize,
    reshard,
)

__all__ = ["Arm", "Cluster", "Cost", "drifting_loads", "simulate"]

Arm = Literal["ep", "rearrange", "replicate", "fssdp"]


@dataclass(frozen=True)
class Cluster:
    """Devices and what things weigh on them.

    Args:
        nodes, per_node: devices are numbered node by node.
        between, inside: bandwidth of a device in bytes a second, across and in nodes.
        seconds_per_token: of an expert, forward and backward.
        token_bytes, expert_bytes: of an activation and of an expert's weights.
        state: bytes of an expert with its optimizer state, in expert_bytes.
        rounds: exchanges of tokens in a step (there and back, forward and backward).
        hidden: seconds of other work that a gather or a reduction can hide behind.
    """

    nodes: int = 2
    per_node: int = 4
    between: float = 12.5e9
    inside: float = 100e9
    seconds_per_token: float = 1e-6
    token_bytes: float = 2048
    expert_bytes: float = 8.4e6
    state: float = 7.0
    rounds: int = 4
    hidden: float = 8 * 8.4e6 / 12.5e9

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node

    @property
    def overlap(self) -> int:
        """t: experts whose copy hides behind other work."""
        return int(self.hidden * self.between / self.expert_bytes + 1e-9)

    def _along(self, own: int, device: int) -> tuple[int, int]:
        """Place in a chain that starts on node `own`."""
        return (device // self.per_node - own) % self.nodes, device

    def link_seconds(self, moved: Tensor) -> float:
        """Of bytes `[from, to]` that leave and enter devices at once."""
        node = torch.arange(self.devices) // self.per_node
        far = node[:, None] != node
        away = moved * ~torch.eye(self.devices, dtype=torch.bool)
        times = [
            (away * kind).sum(axis) / speed
            for kind, speed in ((far, self.between), (~far, self.inside))
            for axis in (0, 1)
        ]
        return float(torch.maximum(times[0] + times[2], times[1] + times[3]).max())

    def copying_seconds(self, before: Tensor, after: Tensor, size: float = 1.0) -> float:
        """Of weights from their homes to where they were not, `size` times expert_bytes each.

        Copies of an expert go along a chain, node by node, so that a device sends it on once.
        """
        home = before.int().argmax(1).tolist()
        moved = torch.zeros(self.devices, self.devices, dtype=torch.float64)
        added = after & ~before
        for e in added.any(1).nonzero().squeeze(1).tolist():
            own = home[e] // self.per_node
            to = added[e].nonzero().squeeze(1).tolist()
            to.sort(key=partial(self._along, own))
            for sender, taker in pairwise([home[e], *to]):
                moved[sender, taker] += size * self.expert_bytes
        return self.link_seconds(moved)


@dataclass(frozen=True)
class Cost:
    """Means over steps.

    Attributes:
        seconds: in all.
        compute, exchange, exposed: its parts.
        imbalance: largest over mean number of tokens of a device.
        copies: experts sent for a step, or moved.
    """

    seconds: float
    compute: float
    exchange: float
    exposed: float
    imbalance: float
    copies: float


def simulate(
    cluster: Cluster,
    loads: Tensor,
    arm: Arm,
    *,
    overlap: int | None = None,
    slots: int = 2,
    window: int = 5,
    period: int = 20,
    resharded: bool = False,
    known: bool = False,
) -> Cost:
    """Cost of an arm on a trace; the first `window` steps only fill the forecast.

    Args:
        loads: `[steps, experts]`, tokens; every device has an equal part of each.
        overlap: t; None: the cluster's.
        slots: m.
        period: steps between new homes.
        resharded: "fssdp" chooses new homes too.
        known: plan with the true loads of the step (what calibration after the gate would reach).
    """
    steps, experts = loads.shape
    if steps <= window:
        raise InvalidArgument(f"{steps} steps, of which the first window={window} only fill")
    if arm not in ("ep", "rearrange", "replicate", "fssdp"):
        raise InvalidArgument(f"arm={arm!r}: ep, rearrange, replicate or fssdp")
    loads = loads.double()
    home = homes(experts, cluster.devices)
    t = cluster.overlap if overlap is None else overlap
    found: list[tuple[float, ...]] = []
    moves = arm == "rearrange" or (arm == "fssdp" and resharded)
    for step in range(window, steps):
        expected = loads[step] if known else forecast(list(loads[:step]), window)
        exposed = sent = 0.0
        if moves and (step - window) % period == 0:
            relieved = min(t, experts) if arm == "fssdp" else 0
            new = reshard(expected[None], cluster.devices, overlap=relieved,
                          per_node=cluster.per_node)[0]  # fmt: skip
            exposed += cluster.copying_seconds(home, new, cluster.state)
            sent += float((new & ~home).sum())
            home = new
        placement = home
        if arm == "replicate":
            placement = torch.ones_like(home)
        elif arm == "fssdp":
            placement = materialize(
                home, expected, overlap=t, slots=slots, per_node=cluster.per_node
            )
        once = cluster.copying_seconds(home, placement)
        exposed += 3 * max(0.0, once - cluster.hidden)  # two gathers and a reduction
        sent += float((placement & ~home).sum())
        tokens = (loads[step] / cluster.devices).expand(cluster.devices, experts)
        routed = even_dispatch(tokens, placement, cluster.per_node)
        own = routed.sum((0, 1))
        compute = float(own.max()) * cluster.seconds_per_token
        exchange = cluster.rounds * cluster.link_seconds(routed.sum(1) * cluster.token_bytes)
        seconds = compute + exchange + exposed
        found.append(
            (seconds, compute, exchange, exposed, float(own.max() / own.mean()), sent)
        )  # fmt: skip
    means = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    return Cost(*means)


def drifting_loads(
    experts: int, tokens: int, steps: int, exponent: float, generator: torch.Generator,
    swaps: float = 0.5,
) -> Tensor:  # fmt: skip
    """Loads `[steps, experts]` drawn from a Zipf distribution whose ranks swap now and then.

    Args:
        exponent: p_i ~ rank_i^-exponent; 0 is uniform.
        swaps: of two experts' ranks, expected in a step.
    """
    p = torch.arange(1, experts + 1, dtype=torch.float64) ** -exponent
    p = p[torch.randperm(experts, generator=generator)]
    found: list[Tensor] = []
    for _ in range(steps):
        if float(torch.rand((), generator=generator)) < swaps:
            a, b = torch.randint(0, experts, (2,), generator=generator).tolist()
            p[[a, b]] = p[[b, a]]
        drawn = torch.multinomial(p, tokens, replacement=True, generator=generator)
        found.append(torch.bincount(drawn, minlength=experts))
    return torch.stack(found)
