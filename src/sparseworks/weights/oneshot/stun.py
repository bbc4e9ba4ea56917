"""STUN (Lee et al. 2024, STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning, arXiv
2409.06211): whole experts first, then single weights of those that stay.

1. Experts that are routed alike are joined, by distances d_ij = lambda_1 ||R_i - R_j|| - lambda_2
   a_ij / mean a, one threshold for all layers (`structured.experts`).
2. A local pruner on what is left, at the sparsity that makes the whole S of the N weights before:

    s_2 = 1 - (1 - S) N / N_after.

The sum of removed experts and zeros is S; removing experts by similarity leaves weights that are
as prunable as before. Routers are not pruned.

In our quick setting (claim 184: six upcycled experts in pairs of near copies) STUN beats Wanda
alone at 60 % in all by 0.13 nats (0.05 to 0.20); similar experts are a little better to remove
than random ones (0.005 nats over 8 seeds, 0.001 to 0.010).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from sparseworks.core import registry
from sparseworks.core.errors import DataError, InvalidArgument, ModelError
from sparseworks.core.masks import masks
from sparseworks.core.patterns import check_sparsity
from sparseworks.core.registry import MethodInfo
from sparseworks.core.types import PruneResult
from sparseworks.models.hooks import duplicate
from sparseworks.models.views import find_prunable
from sparseworks.weights.oneshot.base import Staged
from sparseworks.weights.structured.backup import Backup, Change
from sparseworks.weights.structured.experts import (
    Bank,
    clusters,
    coactivations,
    distances,
    find_banks,
    keep_experts,
)

__all__ = ["STUN"]

_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class STUN(Staged):
    """Remove experts by similarity, then prune the others.

    Args:
        experts: share of all experts to remove.
        local: registered method of the second stage.
        layers: "global": one threshold, layers keep different counts (save with `save_slim`);
            "equal": the same count in every layer, which the config tells.
        routing: lambda_1, of the distance between rows of the router.
        coactivation: lambda_2, of being used by the same tokens.
        kappa: layers with at most so many clusters average them instead of keeping a member.
    """

    experts: float = 0.25
    local: str = "wanda"
    layers: Literal["global", "equal"] = "global"
    routing: float = 1.0
    coactivation: float = 1.0
    kappa: int = 2

    info: ClassVar[MethodInfo] = MethodInfo(
        name="stun",
        title="STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning",
        authors="Lee et al.",
        year=2024,
        card="184",
        room="weights",
        kind="staged",
        needs=("data",),
        pattern="experts, then the local pruner's",
        budget="one threshold over all layers, then the local pruner's",
        tensors="models with routers and 3-D banks of experts",
        cost="one forward pass over the data, and the local pruner's",
        summary="remove experts that are routed alike, then prune single weights",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.experts < 1 or self.layers not in ("global", "equal") or self.kappa < 0:
            raise InvalidArgument(
                "stun: experts= in [0, 1), layers='global' or 'equal', kappa= from 0"
            )

    def prune(  # type: ignore[override]
        self, model: nn.Module, call: Any, *, sparsity: float | None, data: Iterable[Any] | None,
        copy: bool = False, resume: bool = False, **options: Any,
    ) -> PruneResult:  # fmt: skip
        """Both stages, or nothing where one fails.

        Args:
            call: `sparseworks.prune`, for the second stage.
            sparsity: of the whole, removed experts included.
            options: of the second stage.
        """
        if sparsity is None:
            raise InvalidArgument("stun needs `sparsity`, of the whole with the removed experts")
        check_sparsity(sparsity)
        if data is None:
            raise DataError("stun needs calibration batches: give `data=`")
        if resume or masks(model) is not None:
            raise InvalidArgument("stun starts from a model without masks")
        batches = [data] if isinstance(data, (Tensor, Mapping)) else list(data)
        registry.resolve(self.local)
        target = duplicate(model) if copy else model
        before = sum(v.parameter.numel() for v in find_prunable(target))
        backup = Backup()
        try:
            changes, removed, total = self._remove(target, batches, backup)
            left = sum(v.parameter.numel() for v in find_prunable(target))
            second = 1 - (1 - sparsity) * before / left
            if second < -1e-9:
                raise InvalidArgument(
                    f"removing {removed} of {total} experts leaves {left / before:.1%} of the "
                    f"weights, fewer than sparsity={sparsity:g} asks for; lower experts="
                )
            result: PruneResult = call(
                target, self.local, sparsity=max(0.0, second), data=batches, **options
            )
        except BaseException:
            backup.restore()
            raise
        told = f"{removed} of {total} experts are removed, {1 - left / before:.1%} of the weights"
        return replace(
            result,
            method=self.info.name,
            options={**result.options, **registry.options_of(self), "sparsity": sparsity},
            warnings=(told, *result.warnings),
            changes=tuple(changes),
        )

    def _remove(
        self, model: nn.Module, batches: list[Any], backup: Backup
    ) -> tuple[list[Change], int, int]:
        """Stage 1; the changed numbers, and how many experts went of how many."""
        banks = find_banks(model)
        together = coactivations(model, banks, batches)
        found = {
            b.name: distances(b, together[b.name], self.routing, self.coactivation) for b in banks
        }
        least = {b.name: min(b.top_k, b.count) for b in banks}
        total = sum(b.count for b in banks)
        made = {}
        if self.layers == "global":
            removed = round(self.experts * total)
            made = clusters(found, removed, least)
        else:
            removed = 0
            for bank in banks:
                each = round(self.experts * bank.count)
                made |= clusters({bank.name: found[bank.name]}, each, least)
                removed += each
        counts = [b.count for b in banks]
        changes: list[Change] = []
        for bank in banks:
            changes += keep_experts(model, bank, made[bank.name], self.kappa, backup)
        if self.layers == "equal" and removed:
            _tell(model, counts, banks, backup)
            changes = []  # the config tells them all
        return changes, removed, total


def _tell(model: nn.Module, counts: list[int], banks: list[Bank], backup: Backup) -> None:
    config: Any = getattr(model, "config", None)
    kept = {b.count for b in banks}
    names = [n for n in _FIELDS if getattr(config, n, None) == counts[0]]
    if len({*counts}) > 1 or len(kept) > 1 or not names:
        raise ModelError("no config field tells the number of experts; use layers='global'")
    for name in names:
        if getattr(config, name) == counts[0]:  # another name of one field may have set it
            backup.set(config, name, kept.copy().pop())
