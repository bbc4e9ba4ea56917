"""SAP (Diao et al. 2023, Pruning Deep Neural Networks from a Sparsity Perspective).

Train from the initialisation, prune, rewind, and again. How much a round removes follows from the
PQ index I of the trained survivors of each unit (`sparseworks.core.measures`):

    r     = ceil(d (1 + eta)^(-q / (q - p)) (1 - I)^(p q / (q - p)))     weights that are needed
    share = clip(gamma (1 - r / d), 0, beta)                             of the d survivors,

and floor(d share) of the smallest |w| go. At p = 1/2, q = 1, eta = 0, gamma = 1 the share is I.
With gamma huge the share is beta while any weight may go: iterative pruning of lottery tickets.

What is left after a cut is more even, so the index and with it the share fall from round to round:
with the defaults a perceptron on digits is 68 % sparse after 30 rounds, and no less accurate.
Raise gamma or eta to go further.

In our quick setting (claim 124) the index falls by 0.14 as a perceptron gets sparse; its rise until
accuracy is 30 points down (0.037, -0.002 to 0.075) is not certain on 8 seeds, and there is no gain
over cutting a fifth every round at equal sparsity (0.0 points, -0.2 to 0.1).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import Masks, masks
from sparseworks.core.measures import check_powers, pq_bound, pq_index
from sparseworks.core.patterns import Unstructured, count_dropped
from sparseworks.core.registry import MethodInfo
from sparseworks.models.views import View
from sparseworks.training.experiment import Driver, Experiment
from sparseworks.training.runs import Finished

__all__ = ["SAP", "drop_smallest"]

Scope = Literal["neuron", "layer", "global"]


@dataclass(frozen=True)
class SAP(Driver):
    """Iterative pruning that asks the weights how many of them may go.

    The run "dense" is a whole training, "round t" the training after t prunings, all from the same
    initialisation. The model becomes the last one. With `sparsity` the last round removes only what
    is missing to it; without, all rounds are made. It ends early when no unit gives anything.

    Args:
        rounds: prunings at most.
        scope: what has an index of its own: one output's weights, a tensor, or all of them.
        p: the lower power of the index.
        q: the higher power.
        eta: share of the kept sum of |w|^p that removed weights may hold; higher removes more.
        gamma: factor on the share.
        beta: largest share that a round removes of a unit, below 1.
    """

    rounds: int = 10
    scope: Scope = "global"
    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9

    info: ClassVar[MethodInfo] = MethodInfo(
        name="sap",
        title="Pruning Deep Neural Networks from a Sparsity Perspective",
        authors="Diao et al.",
        year=2023,
        card="124",
        room="weights",
        kind="driver",
        needs=("training",),
        pattern="unstructured",
        budget="from the PQ index, per scope",
        cost="a whole training a round, and one dense",
        summary="rewind and retrain; a sparsity index says how much each round removes",
    )

    def __post_init__(self) -> None:
        check_powers(self.p, self.q, "sap")
        if self.scope not in get_args(Scope):
            raise InvalidArgument(f"sap: scope={self.scope!r} is not one of {get_args(Scope)}")
        if self.rounds < 1 or not self.gamma > 0 or not self.eta >= 0 or not 0 < self.beta < 1:
            raise InvalidArgument(
                f"sap: rounds={self.rounds}, gamma={self.gamma}, eta={self.eta}, beta={self.beta}; "
                "rounds >= 1, gamma > 0, eta >= 0 and 0 < beta < 1 are needed"
            )

    def run(self, experiment: Experiment) -> Finished:
        if experiment.pattern != Unstructured():
            raise InvalidArgument(f"sap removes single weights, not {experiment.pattern}")
        if experiment.budget != type(self).budget:
            raise InvalidArgument("sap: the index says who pays; choose `scope`, not `budget`")
        experiment.total = 1 + self.rounds
        last = experiment.train("dense")
        record: Masks | None = None
        for t in range(1, self.rounds + 1):
            found = self._pruned(experiment, last)
            if found is None:
                break
            record = found
            last = experiment.train(f"round {t}", record=record)
        _warn_short(experiment, 0.0 if record is None else record.sparsity(), self.rounds)
        return last

    @torch.no_grad()
    def _pruned(self, experiment: Experiment, trained: Finished) -> Masks | None:
        """The masks after pruning a trained run; None when nothing goes."""
        model = trained.into(experiment.fresh())
        views, before = experiment.views(model), masks(model)
        units, kept = [], []
        for view in views:
            units.append(self._units(view, view.matrix().detach()))
            mask = torch.ones_like(view.parameter, dtype=torch.bool)
            if before is not None and view.name in before:
                mask = before[view.name].to(mask.device)
            kept.append(self._units(view, view.matrix(mask)))
        joined = self.scope == "global"
        groups = [torch.cat(units, 1)] if joined else units
        alive = [torch.cat(kept, 1)] if joined else kept
        counts = [self.counts(w, k) for w, k in zip(groups, alive)]
        if experiment.sparsity is not None:
            whole = sum(k.numel() for k in alive)
            gone = whole - sum(int(torch.count_nonzero(k)) for k in alive)
            counts = _at_most(counts, max(0, count_dropped(whole, experiment.sparsity) - gone))
        if not any(bool(c.any()) for c in counts):
            return None
        left = [drop_smallest(*x) for x in zip(groups, alive, counts)]
        if joined:
            left = list(torch.split(left[0], [u.shape[1] for u in units], 1))
        found = Masks.of(
            {v.name: v.from_matrix(m.reshape(v.shape)).contiguous() for v, m in zip(views, left)},
            self.info.name,
        )
        return found if before is None else before.merged(found)

    def _units(self, view: View, matrix: Tensor) -> Tensor:
        """`[units, d]` of a tensor."""
        return matrix if self.scope == "neuron" else matrix.reshape(1, -1)

    def counts(self, values: Tensor, kept: Tensor) -> Tensor:
        """How many weights each unit gives up.

        Args:
            values: trained weights `[units, d]`.
            kept: bool `[units, d]`, the survivors.

        Returns:
            int64 `[units]`.
        """
        alive = kept.sum(1)
        index = pq_index(values, kept, p=self.p, q=self.q)
        bound = pq_bound(index, alive, p=self.p, q=self.q, eta=self.eta)
        spare = alive - torch.ceil(bound - 1e-9 * alive)  # the slack is the rounding of the powers
        wanted = torch.minimum(self.gamma * spare, self.beta * alive.double())
        return torch.floor(wanted + 1e-9 * alive).clamp_min(0).long()


def drop_smallest(values: Tensor, kept: Tensor, counts: Tensor) -> Tensor:
    """`kept` less the `counts` smallest |w| among the survivors of each row; the lowest index of
    equal ones stays.

    Args:
        values: `[units, d]`.
        kept: bool `[units, d]`.
        counts: int64 `[units]`, at most the survivors of the row.

    Returns:
        bool `[units, d]`.
    """
    size = values.detach().float().abs().masked_fill(~kept, -torch.inf)
    order = size.sort(dim=1, descending=True, stable=True).indices
    stay = torch.arange(values.shape[1], device=values.device) < (kept.sum(1) - counts)[:, None]
    return torch.zeros_like(kept).scatter_(1, order, stay)


def _warn_short(experiment: Experiment, reached: float, rounds: int) -> None:
    """Say that the weights did not give up what the caller asked for."""
    asked = experiment.sparsity or 0.0
    if reached < asked - 1e-3:
        warnings.warn(
            f"sap: sparsity {reached:.4f} of {asked:g} after {len(experiment.finished) - 1} of "
            f"{rounds} rounds; give more rounds, a higher gamma, or a wider scope",
            stacklevel=2,
        )


def _at_most(counts: list[Tensor], allowed: int) -> list[Tensor]:
    """The counts, scaled down in proportion where they add up to more than is allowed."""
    wanted = torch.cat(counts)
    total = int(wanted.sum())
    if total <= allowed:
        return counts
    exact = wanted.double() * (allowed / total)
    given = exact.floor().long()
    rest = (given.double() - exact).sort(stable=True).indices[: allowed - int(given.sum())]
    given[rest] += 1
    return list(torch.split(given, [len(c) for c in counts]))
