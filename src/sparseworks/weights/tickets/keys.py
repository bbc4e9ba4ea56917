"""Split keys: the kernels that carry most of a ticket are withheld, and belong to the owner.

    E[o, i] = sum over the kernel of |m w_0|
    walk: i uniform; per convolution o ~ E[o, i] / sum_o E[o, i], kernel (o, i) is marked, i = o

The ticket is released without the marked kernels; who trains it without them ends at a lower
accuracy (edge-weighted paths of Chen et al. 2021, You are caught stealing my winning lottery
ticket!).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import Masks
from sparseworks.core.random import generator_for

__all__ = ["Split", "joined", "matched_split", "split", "walk"]


@dataclass(frozen=True)
class Split:
    """A ticket in two parts; no weight is in both.

    Args:
        released: masks without the key.
        key: the kernels that are withheld, as masks of the same names.
    """

    released: Masks
    key: Masks

    @property
    def withheld(self) -> int:
        """Weights in the key."""
        return sum(self.key.entry(n).kept for n in self.key)


def joined(parts: Split) -> Masks:
    """The whole ticket again."""
    found = {n: m | parts.key[n] if n in parts.key else m for n, m in parts.released.items()}
    return Masks.of(found, parts.released.method)


def walk(energies: Sequence[Tensor], walks: int, generator: torch.Generator) -> list[Tensor]:
    """Random walks through the channels of a stack of convolutions.

    Args:
        energies: per convolution `[out, in]`, not negative, in forward order.
        walks: how many start.
        generator: on the CPU.

    Returns:
        Per convolution the kernels visited, `[walks, 2]` of (out, in); `[0, 2]` where all are
        empty. A channel that the next convolution does not have (another width, a shortcut) or
        whose kernels are all empty is drawn again among those that have any.
    """
    visited = []
    channel = torch.randint(energies[0].shape[1], (walks,), generator=generator)
    for energy in energies:
        alive = (energy.sum(0) > 0).nonzero().flatten()
        if not len(alive):
            visited.append(torch.zeros(0, 2, dtype=torch.long))
            continue
        bad = ~torch.isin(channel, alive)
        again = torch.randint(len(alive), (int(bad.sum()),), generator=generator)
        channel[bad] = alive[again]
        nxt = torch.multinomial(energy.t()[channel], 1, generator=generator)[:, 0]
        visited.append(torch.stack([nxt, channel], 1))
        channel = nxt
    return visited


def split(model: nn.Module, record: Masks, *, walks: int = 1000, seed: int = 0) -> Split:
    """Withhold the kernels that random walks along large weights visit.

    Args:
        model: with the weights w_0; not changed.
        record: the ticket's masks; its convolutions are walked in the model's order.
        walks: N; more take more kernels.
        seed: of the walks.

    Raises:
        InvalidArgument: no walks.
        ModelError: no convolution has a mask.
    """
    if walks < 1:
        raise InvalidArgument(f"walks={walks} must be at least 1")
    record.check(model)
    named = [(n, p) for n, p in model.named_parameters() if n in record and p.dim() > 2]
    if not named:
        raise ModelError("no convolution has a mask, so there are no kernels to withhold")
    energies = [
        (p.detach().cpu().double().abs() * record[n]).reshape(*p.shape[:2], -1).sum(-1)
        for n, p in named
    ]
    visited = walk(energies, walks, generator_for(seed, "walks"))
    marked = {}
    for (name, parameter), steps in zip(named, visited):
        marks = torch.zeros(parameter.shape[:2], dtype=torch.bool)
        marks[steps[:, 0], steps[:, 1]] = True
        marked[name] = marks
    return _split(record, marked)


def matched_split(record: Masks, key: Masks, *, seed: int = 0) -> Split:
    """The control of a key: random kernels, as many and with as many weights each, per tensor."""
    marked = {}
    for name, mask in key.items():
        sizes = record[name].reshape(*mask.shape[:2], -1).sum(-1)
        wanted = mask.reshape(*mask.shape[:2], -1).sum(-1)
        marks = torch.zeros(mask.shape[:2], dtype=torch.bool)
        generator = generator_for(seed, name)
        for size in torch.unique(wanted[wanted > 0]).tolist():
            places = (sizes == size).nonzero()
            count = int((wanted == size).sum())
            chosen = places[torch.randperm(len(places), generator=generator)[:count]]
            marks[chosen[:, 0], chosen[:, 1]] = True
        marked[name] = marks
    return _split(record, marked)


def _split(record: Masks, marked: dict[str, Tensor]) -> Split:
    key, released = {}, {}
    for name, mask in record.items():
        if name in marked:
            taken = marked[name].view(*marked[name].shape, *[1] * (mask.dim() - 2))
            key[name], mask = mask & taken, mask & ~taken
        released[name] = mask
    return Split(Masks.of(released, record.method), Masks.of(key, record.method))
