"""Random search: the control that every search for a sparse network must beat.

    m_i ~ masks of one sparsity, i = 1..N
    i*  = argmin_i  L(m_i * W_0)        without any training
    train m_i* * W_0

The winner is compared with draws that nothing chose, trained from the same W_0 in the same data
order (Rezsa Farahani 2024, Random Search as a Baseline for Sparse Neural Network Architecture
Search). At a He initialisation the loss mostly measures the scale of the logits, so the accuracy at
initialisation is reported beside it.

In our quick setting (claim 027: perceptrons on digits, 200 draws) the winner is no worse than masks
that nothing chose and learns no faster; whether it is better by half a point is not decided (0.3
points, -0.3 to 0.8). At 80 % it is 1.5 points below the dense network.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from torch import nn

from sparseworks.core.budgets import Budget, get_budget
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.core.masks import Masks
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Batch, call, default_loss, logits_of, move, split
from sparseworks.training.experiment import Driver, Experiment
from sparseworks.training.recalibration import reestimate
from sparseworks.training.runs import Finished
from sparseworks.weights.tickets.nodes import NodeSampler

__all__ = ["RandomSearch", "Search", "random_search"]

T = TypeVar("T")


@dataclass(frozen=True)
class Search(Generic[T]):
    """What a random search saw.

    Args:
        best: the candidate with the lowest score, the first of equals.
        index: its number.
        scores: of all candidates, in order.
    """

    best: T
    index: int
    scores: tuple[float, ...]


def random_search(
    sample: Callable[[int], T], score: Callable[[T], float], budget: int
) -> Search[T]:
    """The best of `budget` independent candidates.

    Args:
        sample: number of the candidate -> candidate; the same number must give the same one, for
            the best is drawn again instead of all being kept.
        score: lower is better; of masks at initialisation, of trained networks, of anything.
        budget: candidates to look at.

    Raises:
        InvalidArgument: no candidates, or a score that is NaN.
    """
    if budget < 1:
        raise InvalidArgument(f"a random search of {budget} candidates; at least 1 is needed")
    scores = []
    for number in range(budget):
        value = float(score(sample(number)))
        if math.isnan(value):
            raise InvalidArgument(f"the score of candidate {number} is NaN")
        scores.append(value)
    index = min(range(budget), key=scores.__getitem__)
    return Search(sample(index), index, tuple(scores))


@dataclass(frozen=True)
class RandomSearch(Driver):
    """Train the best of many random masks, judged before any training.

    The run "winner" becomes the model; "random 1".. are draws that nothing chose, "dense" is the
    whole network, all from the same weights and in the same data order.

    Args:
        candidates: N, masks that are scored.
        unit: "nodes" masks hidden units, the same share of every layer (`sparsity` counts nodes;
            between two hidden layers (1 - s)^2 of the weights stay); "weights" masks single
            weights by the experiment's budget and pattern.
        by: what is least at initialisation: "loss", "error" (1 - accuracy), or "flatness", minus
            the norm of the gradient.
        controls: random masks that are trained too; with one or more, also the dense network.
    """

    candidates: int = 100
    unit: Literal["nodes", "weights"] = "nodes"
    by: Literal["loss", "error", "flatness"] = "loss"
    controls: int = 0

    budget: str | Mapping[str, float] | Budget = field(default="uniform", kw_only=True)
    info: ClassVar[MethodInfo] = MethodInfo(
        name="random-search",
        title="Random Search as a Baseline for Sparse Neural Network Architecture Search",
        authors="Rezsa Farahani",
        year=2024,
        card="027",
        room="weights",
        kind="driver",
        needs=("training", "data"),
        pattern="nodes, or any",
        cost="a forward pass over `data` per candidate, one training",
        summary="the best of random masks by their loss before training",
    )

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.controls < 0:
            raise InvalidArgument(
                f"random-search: candidates={self.candidates} must be at least 1 and "
                f"controls={self.controls} at least 0"
            )
        if self.unit not in ("nodes", "weights") or self.by not in _SCORES:
            raise InvalidArgument(
                f"random-search: unit={self.unit!r} must be 'nodes' or 'weights', "
                f"by={self.by!r} one of {', '.join(map(repr, _SCORES))}"
            )

    def run(self, experiment: Experiment) -> Finished:
        if experiment.sparsity is None or not experiment.data:
            raise InvalidArgument(
                "random-search needs `sparsity`, and `data`: training batches to score the masks on"
            )
        seed, net = experiment.seed, experiment.fresh()
        device = next(net.parameters()).device
        data = [move(batch, device) for batch in experiment.data]
        sample = self._sampler(experiment, data[0])
        whole = experiment.fresh().state_dict()

        def judged(record: Masks, by: str) -> float:
            net.load_state_dict(whole)
            record.apply(net)
            reestimate(net, data)
            return _SCORES[by](net.eval(), data)

        found = random_search(
            lambda i: sample(seed, i), lambda record: judged(record, self.by), self.candidates
        )
        experiment.total = 1 + self.controls + (self.controls > 0)
        experiment.figures.update(
            {
                "winner's score": found.scores[found.index],
                "mean score": statistics.fmean(found.scores),
                "winner's loss before training": judged(found.best, "loss"),
                "winner's accuracy before training": 100 * (1 - judged(found.best, "error")),
            }
        )
        winner = experiment.train("winner", record=found.best)
        # numbers beyond the search's: no control is a candidate
        others = [
            experiment.train(f"random {i + 1}", record=sample(seed, self.candidates + i))
            for i in range(self.controls)
        ]
        if others:
            dense = experiment.train("dense")
            if experiment.evaluate is not None:
                mean = statistics.fmean(r.figures["score"] for r in others)
                score = winner.figures["score"]
                experiment.figures["winner - random"] = score - mean
                experiment.figures["winner - dense"] = score - dense.figures["score"]
        return winner

    def _sampler(self, experiment: Experiment, example: Batch) -> Callable[[int, int], Masks]:
        """(seed, number) -> masks."""
        assert experiment.sparsity is not None
        sparsity = experiment.sparsity
        net = experiment.fresh()
        views = experiment.views(net)
        if self.unit == "nodes":
            return NodeSampler(net, views, example, sparsity).draw
        pattern, budget = experiment.pattern, get_budget(experiment.budget)

        def weights(seed: int, number: int) -> Masks:
            scores = {
                v.name: torch.rand(v.shape, generator=generator_for(seed, v.name, number))
                for v in views
            }
            keep = budget([v.spec(pattern) for v in views], sparsity, scores)
            found = {v.name: v.select(pattern, scores[v.name], keep[v.name]) for v in views}
            return Masks.of(found, self.info.name, str(pattern))

        return weights


def _loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        values = [float(default_loss(model, b)) for b in batches]
    return statistics.fmean(values)


def _error(model: nn.Module, batches: Sequence[Batch]) -> float:
    wrong = count = 0
    for batch in batches:
        _, target = split(batch)
        if target is None:
            raise DataError("random-search: the batches carry no labels to count errors with")
        with torch.no_grad():
            wrong += int((logits_of(call(model, batch)).argmax(-1) != target).sum())
        count += target.numel()
    return wrong / count


def _flatness(model: nn.Module, batches: Sequence[Batch]) -> float:
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        losses = [default_loss(model, b) for b in batches]
        total = torch.stack(losses).mean()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return -math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))


_SCORES: dict[str, Callable[[nn.Module, Sequence[Batch]], float]] = {
    "loss": _loss,
    "error": _error,
    "flatness": _flatness,
}
