"""Which device holds which experts for a step (Qing et al. 2025; see `hecate`): pure functions.

A placement is a bool matrix P `[experts, devices]`: every row has a home, and P' adds copies.
Devices are numbered node by node.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument

__all__ = ["copies_of", "even_dispatch", "forecast", "homes", "materialize", "reshard", "route"]


def homes(experts: int, devices: int) -> Tensor:
    """P: equal runs of experts, `[experts, devices]`."""
    if devices < 1 or experts % devices:
        raise InvalidArgument(f"{experts} experts do not divide among {devices} devices")
    place = torch.arange(experts) * devices // experts
    return place[:, None] == torch.arange(devices)


def forecast(history: Sequence[Tensor], window: int = 5) -> Tensor:
    """F `[experts]`: the mean load of the last steps; what this step's gate decides is not known.

    Args:
        history: loads `[experts]` of past steps, dropped tokens included, the newest last.
    """
    if not history or window < 1:
        raise InvalidArgument(f"{len(history)} past loads, window={window}: one at least of each")
    return torch.stack(list(history[-window:])).double().mean(0)


def copies_of(load: Tensor, count: int, room: int, most: int) -> Tensor:
    """How many of `room` copies each of the `count` largest loads gets, in proportion, at most
    `most` each; largest remainders first, then the lowest index."""
    order = load.argsort(descending=True, stable=True)[:count]
    share = torch.zeros_like(load)
    share[order] = load[order].clamp_min(0)
    found = torch.zeros(len(load), dtype=torch.long)
    left, open_ = min(room, most * len(order)), share > 0
    while left > 0 and bool(open_.any()):
        quota = torch.where(open_, share, 0.0)
        quota = quota / quota.sum() * left
        given = torch.minimum(quota.floor().long(), most - found)
        if not int(given.sum()):
            first = (quota - quota.floor()).argsort(descending=True, stable=True)
            for e in [e for e in first.tolist() if bool(open_[e])][:left]:
                given[e] = 1
        found, left = found + given, left - int(given.sum())
        open_ &= found < most
    return found


def materialize(
    placement: Tensor, load: Tensor, *, overlap: int, slots: int, per_node: int | None = None
) -> Tensor:
    """P': copies of the most loaded experts (the paper's algorithm of sparse materialisation).

    With t = min(overlap, experts) and m = min(slots, t): where t <= m the t most loaded are copied
    to every device; else the devices * m slots are shared among them in proportion to the load, one
    copy to a device at most, first to nodes that lack the expert and have most slots left.

    Args:
        placement: P, one home for each expert.
        load: F, forecast or true.
        overlap: experts whose copy hides behind other work.
        slots: copies that a device has memory for.
        per_node: devices of a node; None: all are on one.
    """
    experts, devices = placement.shape
    if overlap < 0 or slots < 0 or not bool((placement.sum(1) == 1).all()):
        raise InvalidArgument("overlap and slots from 0, and one home for each expert")
    t = min(overlap, experts)
    m = min(slots, t)
    found = placement.clone()
    if t == 0 or m == 0:
        return found
    order = load.argsort(descending=True, stable=True)[:t].tolist()
    if t <= m:
        found[order] = True
        return found
    wanted = copies_of(load.double(), t, devices * m, devices - 1)
    node = torch.arange(devices) // (per_node or devices)
    free = torch.full((devices,), m)
    for e in order:
        for _ in range(int(wanted[e])):
            able = [d for d in range(devices) if free[d] > 0 and not found[e, d]]
            if not able:
                break
            held = [int(found[e][node == n].sum()) for n in range(int(node.max()) + 1)]
            spare = [int(free[node == n].sum()) for n in range(len(held))]
            best = min(able, key=lambda d: (held[node[d]], -spare[node[d]], -int(free[d]), d))
            found[e, best] = True
            free[best] -= 1
    return found


def _holders(placement: Tensor, expert: int, source: int, per_node: int) -> list[int]:
    """The nearest ones: the device itself, else those of its node, else all."""
    held = placement[expert].nonzero().squeeze(1).tolist()
    if source in held:
        return [source]
    near = [d for d in held if d // per_node == source // per_node]
    return near or held


def even_dispatch(tokens: Tensor, placement: Tensor, per_node: int | None = None) -> Tensor:
    """Tokens from device to device, each expert's spread evenly over its nearest holders.

    Args:
        tokens: `[devices, experts]`, where they are and what they need.

    Returns:
        `[devices, experts, devices]`, of which the last axis adds up to `tokens`.
    """
    experts, devices = placement.shape
    found = torch.zeros(devices, experts, devices, dtype=torch.float64)
    for source in range(devices):
        for e in range(experts):
            near = _holders(placement, e, source, per_node or devices)
            found[source, e, near] = float(tokens[source, e]) / len(near)
    return found


def route(placement: Tensor, per_node: int | None = None) -> Tensor:
    """`[devices, experts]`: the holder to which a device sends all its tokens of an expert, which
    is its own copy, or the nearest ones in turn. Whole groups keep sums as data parallelism has
    them."""
    experts, devices = placement.shape
    found = torch.empty(devices, experts, dtype=torch.long)
    for source in range(devices):
        for e in range(experts):
            near = _holders(placement, e, source, per_node or devices)
            found[source, e] = near[(source + e) % len(near)]
    return found


def reshard(loads: Tensor, devices: int, *, overlap: int, per_node: int | None = None) -> Tensor:
    """Homes `[layers, experts, devices]` for all layers together (heterogeneous re-sharding).

    Every device has layers * experts / devices places. First those experts that no copy relieves
    (beyond the `overlap` most loaded of their layer), layers by their largest load, each to the
    node of least load, then its device of least load; the others fill what is left alike.

    Args:
        loads: `[layers, experts]`.
    """
    layers, experts = loads.shape
    if (layers * experts) % devices:
        raise InvalidArgument(f"{layers * experts} experts do not divide among {devices} devices")
    size = per_node or devices
    room = [layers * experts // devices] * devices
    weight = [0.0] * devices
    found = torch.zeros(layers, experts, devices, dtype=torch.bool)
    order = loads.argsort(dim=1, descending=True, stable=True)
    first = loads.amax(1).argsort(descending=True, stable=True).tolist()
    for relieved in (False, True):
        for layer in first:
            part = order[layer, :overlap] if relieved else order[layer, overlap:]
            for e in part.tolist():
                able = [d for d in range(devices) if room[d]]

                def burden(d: int) -> tuple[float, float, int]:
                    node = range(d // size * size, min(devices, (d // size + 1) * size))
                    return sum(weight[i] for i in node), weight[d], d

                best = min(able, key=burden)
                found[layer, e, best] = True
                room[best] -= 1
                weight[best] += 0.0 if relieved else float(loads[layer, e])
    return found
