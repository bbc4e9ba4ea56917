"""Experts on several processes, each on one, with copies for a step (see `hecate`)."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparseworks.experts.banks import ACTIVATIONS, Experts
from sparseworks.experts.hecate_plan import homes, route
from sparseworks.experts.products import segments
from sparseworks.experts.routing import Pairs, Routing

__all__ = ["ShardedExperts"]


class ShardedExperts(Experts):
    """The experts of one process, and copies of others for a step.

    Args:
        whole: all experts, the same on every process.
        group: of the processes; None: all.
        per_node: processes of a node; None: LOCAL_WORLD_SIZE, or all.
        keep: hold copies until the backward pass.
        exact: sum gradients in fp64.

    Attributes:
        home: P, `[experts, processes]`.
        placement: P' of the next call.
        gathered, reduced: bytes that all processes sent so far, for weights and gradients.
    """

    def __init__(
        self, whole: Experts, group: Any = None, *, per_node: int | None = None,
        keep: bool = False, exact: bool = True,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.count, self.width, self.hidden = whole.count, whole.width, whole.hidden
        self.gated, self.activation, self.first = whole.gated, whole.activation, whole.first
        self.group, self.keep, self.exact = group, keep, exact
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.per_node = per_node or int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.home = homes(self.count, self.size)
        self.placement = self.home.clone()
        self.gathered = self.reduced = 0
        own = self.home[:, self.rank]
        names = (self.first, "down_proj", "up_bias", "down_bias")
        for name, bank in zip(names, whole.weights, strict=True):
            part = None if bank is None else nn.Parameter(bank.detach()[own].clone())
            self.register_parameter(name, part)

    def forward(self, x: Tensor, routing: Routing, *, dense: bool = False) -> Tensor:
        pairs = Pairs.of(routing.chosen)
        to = route(self.placement, self.per_node)
        mine = torch.zeros(self.size, self.count, dtype=torch.long)
        mine[to[self.rank], torch.arange(self.count)] = pairs.counts.cpu()
        counts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(counts, mine, group=self.group)
        # rows by holder, then by expert: a holder's experts lie in order within its part
        order = to[self.rank][pairs.expert.cpu()].argsort(stable=True).to(x.device)
        sent = mine.sum(1).tolist()
        taken = torch.stack([c[self.rank] for c in counts])  # [sources, experts]
        rows: Tensor = _Exchange.apply(  # type: ignore[no-untyped-call]
            x[pairs.token[order]], sent, taken.sum(1).tolist(), self.group
        )
        banks = [b for b in self.weights if b is not None]
        y: Tensor = _Compute.apply(self, rows, taken, *banks)  # type: ignore[no-untyped-call]
        y = _Exchange.apply(y, taken.sum(1).tolist(), sent, self.group)  # type: ignore[no-untyped-call]
        y = y * routing.weights.to(x.dtype)[pairs.token[order], pairs.expert[order], None]
        back = torch.empty_like(y).index_copy(0, order, y)  # as plain experts add them up
        return x.new_zeros(len(x), self.width).index_add(0, pairs.token, back)

    def packed(self, banks: list[Tensor], place: int) -> Tensor:
        """One expert as one vector."""
        return torch.cat([b[place].detach().flatten() for b in banks])

    def unpacked(self, flat: Tensor, banks: list[Tensor]) -> list[Tensor]:
        """Vectors `[n, size]` as banks of n."""
        parts = torch.split(flat, [b[0].numel() for b in banks], 1)
        return [p.reshape(len(flat), *b.shape[1:]) for p, b in zip(parts, banks)]

    def held(self, rank: int) -> list[int]:
        """Experts on a process in this step, in order."""
        found: list[int] = self.placement[:, rank].nonzero().squeeze(1).tolist()
        return found

    def gather(self) -> list[Tensor]:
        """The banks of all experts that are here in this step."""
        banks = [b for b in self.weights if b is not None]
        flat = {e: self.packed(banks, i) for i, e in enumerate(self.own)}
        size = sum(b[0].numel() for b in banks)
        out, into = self._moves()
        coming = {p: banks[0].new_empty(len(es), size) for p, es in into.items()}
        self._send({p: torch.stack([flat[e] for e in es]) for p, es in out.items()}, coming)
        for p, es in into.items():
            flat |= dict(zip(es, coming[p]))
        self.gathered += self._copies() * size * banks[0].element_size()
        held = self.held(self.rank)
        return self.unpacked(torch.stack([flat[e] for e in held]), banks)

    def reduce(self, grads: Tensor) -> list[Tensor]:
        """Gradients `[held, size]` of what was here, summed at home, as banks."""
        banks = [b for b in self.weights if b is not None]
        flat = dict(zip(self.held(self.rank), grads))
        into, out = self._moves()  # the other way round
        coming = {p: grads.new_empty(len(es), grads.shape[1]) for p, es in into.items()}
        self._send({p: torch.stack([flat[e] for e in es]) for p, es in out.items()}, coming)
        for p in sorted(coming):
            for e, part in zip(into[p], coming[p]):
                flat[e] = flat[e] + part
        self.reduced += self._copies() * grads.shape[1] * grads.element_size()
        total = torch.stack([flat[e] for e in self.own]) / self.size
        return [g.to(b.dtype) for g, b in zip(self.unpacked(total, banks), banks)]

    @property
    def own(self) -> list[int]:
        """Experts whose home is here."""
        found: list[int] = self.home[:, self.rank].nonzero().squeeze(1).tolist()
        return found

    def _copies(self) -> int:
        return int((self.placement & ~self.home).sum())

    def _moves(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Experts by process: those that leave from home here, those that come here."""
        out = {
            p: [e for e in self.own if self.placement[e, p]]
            for p in range(self.size) if p != self.rank
        }  # fmt: skip
        home = self.home.int().argmax(1).tolist()
        into: dict[int, list[int]] = {}
        for e in self.held(self.rank):
            if home[e] != self.rank:
                into.setdefault(home[e], []).append(e)
        return {p: es for p, es in out.items() if es}, into

    def _send(self, out: dict[int, Tensor], into: dict[int, Tensor]) -> None:
        """One message for each pair of processes."""
        peer = (lambda p: p) if self.group is None else (
            lambda p: dist.get_global_rank(self.group, p)
        )  # fmt: skip
        jobs = [dist.P2POp(dist.isend, t, peer(p), self.group) for p, t in sorted(out.items())]
        jobs += [dist.P2POp(dist.irecv, t, peer(p), self.group) for p, t in sorted(into.items())]
        for work in dist.batch_isend_irecv(jobs) if jobs else []:
            work.wait()

    @torch.no_grad()
    def whole(self) -> Experts:
        """All experts, on every process."""
        made = Experts(
            self.count, self.width, self.hidden, gated=self.gated, activation=self.activation,
            bias=self.up_bias is not None, dtype=self.down_proj.dtype,
            device=self.down_proj.device,
        )  # fmt: skip
        for bank, own in zip(made.weights, self.weights, strict=True):
            if bank is not None and own is not None:
                parts = [torch.empty_like(own) for _ in range(self.size)]
                dist.all_gather(parts, own.detach().contiguous(), group=self.group)
                bank.copy_(torch.cat(parts))
        return made.train(self.training)


class _Exchange(torch.autograd.Function):
    """Rows to the processes that take them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: list[int], into: list[int], group: Any) -> Tensor:
        ctx.out, ctx.into, ctx.group = out, into, group
        return _exchanged(x, out, into, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return _exchanged(g, ctx.into, ctx.out, ctx.group), None, None, None


def _exchanged(x: Tensor, out: list[int], into: list[int], group: Any) -> Tensor:
    found = x.new_empty(sum(into), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), into, out, group=group)
    return found


class _Compute(torch.autograd.Function):
    """E_i of rows that lie by source, then by expert; weights come and gradients go in here."""

    @staticmethod
    def forward(ctx: Any, layer: ShardedExperts, rows: Tensor, taken: Tensor, *home: Tensor) -> Any:
        banks = layer.gather()
        ctx.layer, ctx.taken, ctx.placement = layer, taken, layer.placement
        ctx.banks = banks if layer.keep else None
        ctx.save_for_backward(rows)
        return torch.cat([_run(layer, p, c, banks) for p, c in _parts(layer, rows, taken)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        layer: ShardedExperts = ctx.layer
        now, layer.placement = layer.placement, ctx.placement
        banks = layer.gather() if ctx.banks is None else ctx.banks
        total: Tensor | float = 0.0
        found = []
        parts = zip(_parts(layer, rows, ctx.taken), torch.split(g, ctx.taken.sum(1).tolist()))
        for (part, counts), own in parts:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (part, *banks)]
                y = _run(layer, leaves[0], counts, leaves[1:])
            dx, *grads = torch.autograd.grad(y, leaves, own)
            found.append(dx)
            flat = torch.cat([d.flatten(1) for d in grads], 1)
            total = total + (flat.double() if layer.exact else flat)
        assert isinstance(total, Tensor)
        grads = layer.reduce(total)
        layer.placement = now
        return None, torch.cat(found), None, *grads


def _parts(layer: ShardedExperts, rows: Tensor, taken: Tensor) -> list[tuple[Tensor, list[int]]]:
    """(rows, rows of each expert here) of every source."""
    held = layer.held(layer.rank)
    split = torch.split(rows, taken.sum(1).tolist())
    return [(part, taken[s, held].tolist()) for s, part in enumerate(split)]


def _run(layer: ShardedExperts, x: Tensor, counts: list[int], banks: list[Tensor]) -> Tensor:
    own = iter(banks)
    w: Any = tuple(None if b is None else next(own) for b in layer.weights)
    return segments(x, counts, w, ACTIVATIONS[layer.activation], layer.gated)
