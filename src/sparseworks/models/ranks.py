"""Calibration batches dealt out over the ranks of a process group, to the same sums bit for bit.

Rank r computes batches r, r + N, ... What its inputs add to the sums (`Collector.part`) goes to
the rank that owns the weight, which merges the parts of all ranks in the order of the batches, as
one process does: a sum in another order (all-reduce) would differ in its last bits. So every round
of N batches is a gather: of `in` numbers a weight where norms are summed, of the inputs themselves
(tokens x in) where a Hessian is, whose products cannot be cut without other roundings. In return
the sums and their solution are on one rank each, which sends the new weight to all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.evidence import Collector
from sparseworks.models.calls import Batch, batch_size
from sparseworks.models.matrix import View
from sparseworks.models.sharing import Sharing
from sparseworks.models.tap import Listener

__all__ = ["Evidence", "Ranks"]

Entry = tuple[str, int, int, int, tuple[Tensor, ...], Tensor | None]
"""View, which of its collectors, group, tokens, what they add, what their outputs add."""
Make = Callable[[View, torch.device], Sequence[Collector]]


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
        make: the collectors of a view.
        batches: all of them, also those of other ranks.
        everywhere: the sums of all views are wanted on all ranks.
        share: gather once for weights that see the same inputs. Of several ranks, where each has
            the sums of other weights, none does.

    Attributes:
        collectors: of every view, after `finish`.
        sharing: which views share them, or None.
    """

    def __init__(
        self,
        views: Sequence[View],
        make: Make,
        batches: Sequence[Batch],
        ranks: Ranks,
        everywhere: bool = False,
        share: bool = True,
    ) -> None:
        self.views, self.batches, self.ranks = views, batches, ranks
        self.everywhere, self._make = everywhere, make
        self.owner = {v.name: i % ranks.size for i, v in enumerate(views)}
        self.sharing = Sharing() if share and ranks.size == 1 else None
        self.collectors: dict[str, Sequence[Collector]] = {}
        shapes = {v.name: make(v, torch.device("meta")) for v in views}
        self._kinds = {n: tuple(type(c) for c in several) for n, several in shapes.items()}
        self._groups = {v.name: v.groups for v in views}
        self._powered = {n: any(k.reads_power for k in kinds) for n, kinds in self._kinds.items()}
        self._powers: dict[str, Tensor] = {}
        self._round = self._samples = 0
        self._entries: list[Entry] = []
        if ranks.size > 1:
            for view in views:
                self._of(view)

    def owned(self, view: View) -> bool:
        """Are the sums of this view on this rank?"""
        return self.everywhere or self.owner[view.name] == self.ranks.rank

    @property
    def broken(self) -> bool:
        """Weights that shared their sums have seen different inputs: gather again, unshared."""
        return self.sharing is not None and self.sharing.broken

    def listen(self) -> Listener:
        """What `EvidenceTap` tells of inputs."""

        def listener(view: View, inputs: Tensor, groups: range, outputs: Tensor | None) -> None:
            kinds = self._kinds.get(view.name)
            if not kinds or self.broken:
                return
            power = self._power(view, groups, outputs)
            if self.ranks.size > 1:
                for k, collector in enumerate(self.collectors[view.name]):
                    for group in groups if inputs.numel() else ():
                        parts = tuple(
                            p.detach().to("cpu", copy=True).contiguous()
                            for p in collector.part(inputs.detach())
                        )
                        entry = view.name, k, group, inputs.shape[0], parts, power
                        self._entries.append(entry)
                return
            like = kinds, groups, view.groups, view.shape[1], view.parameter.device
            if self.sharing is None or not self.sharing.covers(view.name, inputs, like):
                for collector in self._of(view):
                    for group in groups:
                        collector.update(inputs.detach(), group)
            self._add(view.name, groups, power)

        return listener

    def end_of_round(self) -> None:
        """Every rank has computed a batch, or had none left."""
        if self.sharing is not None:
            self.sharing.end_of_batch()
        first = self._round
        for index in range(first, min(first + self.ranks.size, len(self.batches))):
            self._samples += batch_size(self.batches[index])
        self._round += self.ranks.size
        if self.ranks.size == 1:
            return
        owners: Iterable[int | None] = [None] if self.everywhere else range(self.ranks.size)
        for owner in owners:
            entries = [e for e in self._entries if owner is None or self.owner[e[0]] == owner]
            for several_entries in self.ranks.gather(entries, owner) or ():
                for name, k, group, tokens, parts, power in several_entries:
                    collector = self.collectors[name][k]
                    at = collector.device
                    collector.tokens[group] += tokens
                    collector.merge(tuple(p.to(at) for p in parts), group)
                    if k == 0:
                        self._add(name, range(group, group + 1), power)
        self._entries.clear()

    def finish(self) -> None:
        """All batches are through: the collectors of every view are complete."""
        leaders = {} if self.sharing is None else self.sharing.leaders
        for view in self.views:
            if view.name not in leaders:
                self._of(view)
        for view in self.views:
            if view.name in leaders:
                self.collectors[view.name] = [c.twin() for c in self.collectors[leaders[view.name]]]
            for collector in self.collectors[view.name]:
                collector.samples = self._samples
                collector.power = self._powers.get(view.name)

    def _of(self, view: View) -> Sequence[Collector]:
        """The collectors of a view, made when it is first seen."""
        if view.name not in self.collectors:
            self.collectors[view.name] = self._make(view, self._device(view))
        return self.collectors[view.name]

    def _device(self, view: View) -> torch.device:
        """Where the sums of a view are: nowhere, where another rank owns them."""
        return view.parameter.device if self.owned(view) else torch.device("meta")

    def _power(self, view: View, groups: range, outputs: Tensor | None) -> Tensor | None:
        """Sum of squares of outputs, where someone asks and they are those of one matrix."""
        if outputs is None or len(groups) != 1 or not self._powered.get(view.name):
            return None
        exact = torch.promote_types(outputs.dtype, torch.float32)
        power: Tensor = torch.linalg.vector_norm(outputs.detach(), dtype=exact)
        power = power.square().float()
        return power if self.ranks.size == 1 else power.cpu()

    def _add(self, name: str, groups: range, power: Tensor | None) -> None:
        if not self._powered.get(name):
            return
        if power is None:
            self._powered[name] = False
            self._powers.pop(name, None)
            return
        known = self._powers.setdefault(name, torch.zeros(self._groups[name], device=power.device))
        known[groups.start] += power
