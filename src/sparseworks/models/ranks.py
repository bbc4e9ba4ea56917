"""Calibration batches dealt out over the ranks of a process group, to the same sums bit for bit.

Rank r computes batches r, r + N, ... What its inputs add to the sums (`Collector.part`) goes to
the rank that owns the weight, which merges the parts of all ranks in the order of the batches, as
one process does: a sum in another order (all-reduce) would differ in its last bits. So every round
of N batches is a gather: of `in` numbers a weight where norms are summed, of the inputs themselves
(tokens x in) where a Hessian is, whose products cannot be cut without other roundings. In return
the sums and their solution are on one rank each, which sends the new weight to all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.evidence import Collector
from sparseworks.models.calls import Batch, batch_size
from sparseworks.models.matrix import View
from sparseworks.models.tap import Listener

__all__ = ["Evidence", "Ranks"]

Entry = tuple[str, int, int, int, tuple[Tensor, ...]]
"""View, which of its collectors, group, tokens, what they add."""


class Ranks:
    """This process among those of a group, or alone.

    Args:
        group: of torch.distributed; None: alone.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        if group is not None:
            from torch import distributed

            self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
            if "gloo" not in str(distributed.get_backend_config(group)):
                self.group = distributed.new_group(  # parts and weights travel by the CPU
                    distributed.get_process_group_ranks(group), backend="gloo"
                )

    def own(self, count: int) -> range:
        """The batches of this rank."""
        return range(self.rank, count, self.size)

    def rounds(self, count: int) -> Iterator[int | None]:
        """The batch of this rank in each round of one a rank; None where none is left for it."""
        for start in range(0, count, self.size):
            yield start + self.rank if start + self.rank < count else None

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier(group=self.group)

    def broadcast(self, value: Any, owner: int) -> Any:
        """What the owner has, on all ranks."""
        if self.size == 1:
            return value
        from torch import distributed

        box = [value if self.rank == owner else None]
        source = distributed.get_global_rank(self.group, owner)
        distributed.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def gather(self, value: Any, owner: int | None) -> list[Any] | None:
        """What all ranks have, in their order, on the owner, or on all of them (None)."""
        from torch import distributed

        found: list[Any] = [None] * self.size
        if owner is None:
            distributed.all_gather_object(found, value, group=self.group)
            return found
        target = distributed.get_global_rank(self.group, owner)
        mine = found if self.rank == owner else None
        distributed.gather_object(value, mine, dst=target, group=self.group)
        return mine


class Evidence:
    """The collectors of some views, fed by the batches of all ranks in their order.

    Args:
        views: each is owned by one rank, in turn.
        collectors: of every view.
        batches: all of them, also those of other ranks.
        everywhere: the sums of all views are wanted on all ranks.
    """

    def __init__(
        self,
        views: Sequence[View],
        collectors: Mapping[str, Sequence[Collector]],
        batches: Sequence[Batch],
        ranks: Ranks,
        everywhere: bool = False,
    ) -> None:
        self.collectors, self.batches, self.ranks = collectors, batches, ranks
        self.everywhere = everywhere
        self.owner = {v.name: i % ranks.size for i, v in enumerate(views)}
        self._round = 0
        self._entries: list[Entry] = []

    def owned(self, view: View) -> bool:
        """Are the sums of this view on this rank?"""
        return self.everywhere or self.owner[view.name] == self.ranks.rank

    def listen(self) -> Listener:
        """What `EvidenceTap` tells of inputs."""

        def listener(view: View, inputs: Tensor, groups: range) -> None:
            for k, collector in enumerate(self.collectors.get(view.name, ())):
                for group in groups:
                    if self.ranks.size == 1:
                        collector.update(inputs.detach(), group)
                    elif inputs.numel():
                        parts = tuple(
                            p.detach().to("cpu", copy=True).contiguous()
                            for p in collector.part(inputs.detach())
                        )
                        self._entries.append((view.name, k, group, inputs.shape[0], parts))

        return listener

    def end_of_round(self) -> None:
        """Every rank has computed a batch, or had none left."""
        first = self._round
        for index in range(first, min(first + self.ranks.size, len(self.batches))):
            for several in self.collectors.values():
                for collector in several:
                    collector.samples += batch_size(self.batches[index])
        self._round += self.ranks.size
        if self.ranks.size == 1:
            return
        owners: Iterable[int | None] = [None] if self.everywhere else range(self.ranks.size)
        for owner in owners:
            entries = [e for e in self._entries if owner is None or self.owner[e[0]] == owner]
            for several_entries in self.ranks.gather(entries, owner) or ():
                for name, k, group, tokens, parts in several_entries:
                    collector = self.collectors[name][k]
                    at = collector.device
                    collector.tokens[group] += tokens
                    collector.merge(tuple(p.to(at) for p in parts), group)
        self._entries.clear()

    def device(self, view: View) -> torch.device:
        """Where the sums of a view are: nowhere, where another rank owns them."""
        return view.parameter.device if self.owned(view) else torch.device("meta")
