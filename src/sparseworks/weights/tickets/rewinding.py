"""Iterative magnitude pruning with late rewinding (Frankle et al. 2019).

    W_k    = weights after k of T steps from the initialisation
    M_0    = all ones
    W_T^r  = train(M_r W_k, from step k to T),   M_{r+1} = top |W_T^r| among M_r,   r = 0, 1, ...

Survivors go back to W_k, not to the initialisation; k = 0 is the original lottery ticket
hypothesis (Frankle & Carbin 2019). Every round drops the same share of what is left. Batch-norm
statistics go back with the weights, the optimizer starts afresh, and the schedule and the data
order continue at step k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import Masks, masks
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.training.experiment import Driver, Experiment
from sparseworks.training.runs import Finished
from sparseworks.weights.tickets.selecting import levels, pruned
from sparseworks.weights.tickets.stability import angle, barrier, distance

__all__ = ["Rewinding"]


@dataclass(frozen=True)
class Rewinding(Driver):
    """Find a sparse network that trains from an early step.

    The run "dense" is a whole training, "rewind point" its first k steps, "level r" the training
    of round r from there; "level 0", which nothing masks, is the reference of the stability and,
    where k = 0, the dense training. The model becomes the last level: the ticket, trained.

    Args:
        rewind: k as a fraction of the steps of a training, in [0, 1).
        rounds: trainings with masks; None: as few as drop at most `share` a round.
        share: of the surviving weights that a round drops at most, where `rounds` is None.
        controls: also train what the ticket is compared with: the same masks on new values (the
            initial values of each tensor in random order, trained from step k too), and masks of
            the same sizes in random places on the rewound weights.
        stability: also measure, for the last level, how far its weights end from those of level 0
            and from those of a training with another data order ("second order").
    """

    rewind: float = 0.05
    rounds: int | None = None
    share: float = 0.2
    controls: bool = False
    stability: bool = False

    info: ClassVar[MethodInfo] = MethodInfo(
        name="rewinding",
        title="Stabilizing the Lottery Ticket Hypothesis",
        authors="Frankle et al.",
        year=2019,
        card="139",
        room="weights",
        kind="driver",
        needs=("training",),
        budget="global",
        cost="one training a round, and one dense",
        summary="iterative magnitude pruning, survivors rewound to an early step of training",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.rewind < 1:
            raise InvalidArgument(f"rewinding: rewind={self.rewind} must be in [0, 1)")
        if not 0 < self.share < 1:
            raise InvalidArgument(f"rewinding: share={self.share} must be in (0, 1)")
        if self.rounds is not None and self.rounds < 1:
            raise InvalidArgument(f"rewinding: rounds={self.rounds} must be at least 1")

    def run(self, experiment: Experiment) -> Finished:
        wanted = levels(self.info.name, experiment.sparsity, self.rounds, self.share)
        extra = 3 * self.controls + self.stability
        experiment.total = 1 + 2 * (self.rewind > 0) + len(wanted) + extra
        dense = experiment.train("dense")
        k = round(self.rewind * int(dense.figures["steps"]))
        point = experiment.train("rewind point", stop_at=k) if k else None
        record: Masks | None = None
        whole = experiment.train("level 0", start=point, first_step=k) if k else dense
        level = whole
        for i, sparsity in enumerate(wanted):
            trained = level.into(experiment.fresh())
            record = pruned(experiment, trained, sparsity, masks(trained))
            level = experiment.train(f"level {i + 1}", start=point, record=record, first_step=k)
        assert record is not None
        if self.controls:
            self._controls(experiment, point, record, k)
        if self.stability:
            self._stability(experiment, point, record, k, whole, level)
        return level

    def _controls(
        self, experiment: Experiment, point: Finished | None, record: Masks, k: int
    ) -> None:
        seed = experiment.seed
        fresh = experiment.once(
            "new values", {"run": "permuted", "seed": seed}, lambda m: permute_values(m, seed)
        )
        experiment.train("same masks, new values", start=fresh, record=record, first_step=k)
        moved = permuted_masks(record, seed)
        experiment.train("random masks, same values", start=point, record=moved, first_step=k)

    def _stability(
        self,
        experiment: Experiment,
        point: Finished | None,
        record: Masks,
        k: int,
        whole: Finished,
        level: Finished,
    ) -> None:
        again = experiment.train(
            "second order", start=point, record=record, first_step=k, seed=experiment.seed + 1
        )
        origin, full, ticket, other = (
            experiment.fresh() if run is None else run.into(experiment.fresh())
            for run in (point, whole, level, again)
        )
        found = {
            "distance to dense": distance(ticket, full, record),
            "angle to dense": angle(ticket, full, origin, record),
            "distance between orders": distance(ticket, other, record),
            "angle between orders": angle(ticket, other, origin, record),
        }
        score = experiment.evaluate
        if score is not None:
            found["barrier between orders"] = barrier(
                ticket, other, lambda m: -score(m), data=experiment.data
            )
        experiment.figures.update(found)


@torch.no_grad()
def permute_values(model: nn.Module, seed: int) -> None:
    """The values of every parameter in random order: a new draw of any independent initialisation,
    without knowing which it was."""
    for name, parameter in model.named_parameters():
        order = torch.randperm(parameter.numel(), generator=generator_for(seed, name))
        flat = parameter.detach().cpu().reshape(-1)
        parameter.copy_(flat[order].view(parameter.shape))


def permuted_masks(record: Masks, seed: int) -> Masks:
    """Masks that keep as many weights of every tensor in random places."""
    found = {}
    for name, mask in record.items():
        order = torch.randperm(mask.numel(), generator=generator_for(seed, f"mask {name}"))
        found[name] = mask.reshape(-1)[order].view(mask.shape)
    return Masks.of(found, record.method)
