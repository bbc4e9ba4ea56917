"""Whole experts by behavioural similarity: the structured half of STUN (Lee et al. 2024, STUN:
Structured-Then-Unstructured Pruning for Scalable MoE Pruning, arXiv 2409.06211).

In every layer, with R_i the router's row of expert i and a_ij the number of calibration tokens
whose top-k holds both,

    d_ij = lambda_1 ||R_i - R_j||_2 - lambda_2 a_ij / mean a.

Pairs are joined in ascending order of d where every cross distance of their clusters is below the
threshold t (complete linkage). One t for all layers, the least that removes the number wanted, so
layers keep different counts; `equal` gives every layer its own t and the same count. Of a cluster
stays the member nearest to the mean of the members' weights, with its row of the router; where a
layer ends with at most kappa clusters, the mean of weights and rows instead. Top-k is unchanged, so
no layer goes below k experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.calibration import replay
from sparseworks.models.calls import Batch
from sparseworks.weights.structured.backup import Backup, Change

__all__ = ["Bank", "clusters", "coactivations", "distances", "find_banks", "keep_experts"]

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
Clusters = list[list[int]]


@dataclass(frozen=True)
class Bank:
    """The experts of one layer and their router.

    Args:
        name: of the module that holds both.
        block: it.
        experts: the module with 3-D banks, `[experts, ..]`.
        router: the module with weight `[experts, width]`.
    """

    name: str
    block: nn.Module
    experts: nn.Module
    router: nn.Module

    @property
    def count(self) -> int:
        weight: Any = self.router.weight
        return int(weight.shape[0])

    @property
    def top_k(self) -> int:
        for owner in (self.router, self.block):
            if isinstance(k := getattr(owner, "top_k", None), int):
                return k
        return 1

    def tensors(self) -> list[tuple[nn.Module, str, bool, Tensor]]:
        """(owner, attribute, is a parameter, tensor) of all that has an entry per expert."""
        found = []
        for owner in (self.experts, self.router):
            for parameter, table in ((True, owner._parameters), (False, owner._buffers)):
                found += [
                    (owner, n, parameter, t)
                    for n, t in table.items()
                    if t is not None and t.ndim and t.shape[0] == self.count
                ]
        return found


def find_banks(model: nn.Module) -> list[Bank]:
    """The layers of a model that route tokens to banks of experts.

    Raises:
        ModelError: there is none, or a router chooses groups of experts first.
    """
    found = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        weight = getattr(router, "weight", None)
        if not isinstance(experts, nn.Module) or not isinstance(router, nn.Module):
            continue
        banks = [p for p in experts._parameters.values() if p is not None and p.ndim == 3]
        if not banks or not isinstance(weight, Tensor) or weight.shape[0] != banks[0].shape[0]:
            continue
        groups = (getattr(router, n, 1) for n in ("num_group", "n_group"))
        if any(isinstance(g, int) and g > 1 for g in groups):
            raise ModelError(
                f"{name}: its router chooses groups of experts first, which must stay alike in "
                "size; experts cannot be removed one by one"
            )
        found.append(Bank(name, module, experts, router))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no layer with a router and a 3-D bank of experts"
        )
    return found


def coactivations(
    model: nn.Module, banks: Sequence[Bank], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Per layer the number of tokens whose top-k holds both experts, `[experts, experts]`.

    The diagonal counts the tokens of each expert.
    """
    counts = {b.name: torch.zeros(b.count, b.count) for b in banks}
    padding: list[Tensor | None] = [None]

    def hook(bank: Bank) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            chosen = next(
                t
                for t in given
                if isinstance(t, Tensor) and t.ndim == 2 and not t.is_floating_point()
            )
            if padding[0] is not None and padding[0].numel() == len(chosen):
                chosen = chosen[padding[0].flatten().to(chosen.device)]
            hot = torch.zeros(len(chosen), bank.count).scatter_(1, chosen.cpu(), 1.0)
            counts[bank.name] += hot.t() @ hot

        return before

    hooks = (b.experts.register_forward_pre_hook(hook(b), with_kwargs=True) for b in banks)
    replay(model, batches, hooks, padding)
    return counts


def distances(bank: Bank, together: Tensor, routing: float, coactivation: float) -> Tensor:
    """d `[experts, experts]`, inf on the diagonal; see this module."""
    weight: Any = bank.router.weight
    rows = weight.detach().float().cpu()
    apart = ~torch.eye(len(rows), dtype=torch.bool)
    usual = together[apart].mean().clamp_min(1e-30)
    found = routing * torch.cdist(rows, rows) - coactivation * together / usual
    return ((found + found.t()) / 2).masked_fill(~apart, torch.inf)


def clusters(
    found: Mapping[str, Tensor], remove: int, least: Mapping[str, int]
) -> dict[str, Clusters]:
    """Clusters per layer after joining `remove` times, by one threshold over all layers.

    Args:
        found: layer -> distances.
        least: layer -> clusters that must stay.

    Raises:
        InvalidArgument: no threshold removes so many.
    """
    pairs = sorted(
        (float(d[i, j]), name, i, j)
        for name, d in found.items()
        for i, j in itertools.combinations(range(len(d)), 2)
    )

    def joined(threshold: float) -> tuple[int, dict[str, Clusters]]:
        made: dict[str, Clusters] = {n: [[i] for i in range(len(d))] for n, d in found.items()}
        removed = 0
        for distance, name, i, j in pairs:
            if distance >= threshold or removed == remove:
                break
            groups, d = made[name], found[name]
            a, b = (next(g for g in groups if x in g) for x in (i, j))
            if a is b or len(groups) <= least[name]:
                continue
            if all(float(d[x, y]) < threshold for x in a for y in b):
                groups.remove(b)
                a += b
                removed += 1
        return removed, made

    steps = sorted({p[0] for p in pairs})
    limits = [*steps[1:], float("inf")]  # a threshold lies just above a distance
    low, high = 0, len(limits) - 1
    if not limits or joined(limits[high])[0] < remove:
        raise InvalidArgument(
            f"{remove} experts cannot be removed: every layer keeps the number that a token uses"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if joined(limits[middle])[0] >= remove else (middle + 1, high)
    return joined(limits[low])[1]


@torch.no_grad()
def keep_experts(
    model: nn.Module, bank: Bank, groups: Clusters, kappa: int, backup: Backup
) -> list[Change]:
    """Leave one expert per cluster in a layer; the numbers of modules that changed."""
    groups = sorted(sorted(g) for g in groups)
    average = len(groups) <= kappa
    kept = [g[0] if average or len(g) == 1 else _central(bank, g) for g in groups]
    count = bank.count
    for owner, attribute, parameter, tensor in bank.tensors():
        new = tensor.detach()[kept].clone()
        if average:
            for place, group in enumerate(groups):
                new[place] = tensor.detach()[group].float().mean(0).to(tensor.dtype)
        backup.tensors.append((owner, attribute, parameter, tensor))
        table: Any = owner._parameters if parameter else owner._buffers
        table[attribute] = nn.Parameter(new, tensor.requires_grad) if parameter else new
    changes = []
    names = {id(m): n for n, m in model.named_modules()}
    for owner in (bank.block, bank.experts, bank.router):
        for attribute in _COUNTS:
            if getattr(owner, attribute, None) == count:
                changes.append(Change(names[id(owner)], attribute, count, len(kept)))
                backup.set(owner, attribute, len(kept))
    return changes


def _central(bank: Bank, group: Sequence[int]) -> int:
    """The member nearest to the mean of the members' weights."""
    far = torch.zeros(len(group))
    for parameter in bank.experts._parameters.values():
        if parameter is not None:
            members = parameter.detach()[list(group)].float().flatten(1)
            far += (members - members.mean(0)).square().sum(1).cpu()
    return group[int(far.argmin())]
