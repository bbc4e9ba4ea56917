"""Sparse model soups (Zimmer, Spiegel & Pokutta 2024).

    M_i       = top |W_{i-1}| among M_{i-1}, dropping the same share of what is left every phase
    W_i^(j)   = retrain(M_i W_{i-1}; seed j or another choice),  j = 1..m
    W_i       = sum_j c_j W_i^(j),  sum_j c_j = 1

Copies of one pruned parent share its masks, so their average is as sparse as they are; batch-norm
statistics of the average are estimated anew. A *uniform* soup averages all copies; a *greedy* one
starts from the best and takes each further copy, best first, that does not lower the score.

In our quick setting (claim 029: a perceptron on digits, 97 % sparse, 3 copies) a soup gains nothing
over the mean of its copies (0.0 points, 95 % interval -0.1 to 0.1): copies that differ in the order
of their data alone end almost at the same place, and one copy trained three times as long is 0.4
points better. A ResNet-20 on images of 8 x 8 gave no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import Masks, attach, masks
from sparseworks.core.registry import MethodInfo
from sparseworks.training.experiment import Driver, Experiment
from sparseworks.training.recalibration import reestimate
from sparseworks.training.runs import Finished, digest_of_masks
from sparseworks.weights.tickets.selecting import levels, pruned

__all__ = ["SparseSoup", "average"]

_TAKEN = {"name", "start", "record", "first_step", "stop_at"}


@dataclass(frozen=True)
class SparseSoup(Driver):
    """Prune, retrain several copies, average them; again until the sparsity is reached.

    The model starts trained. The run "phase i, copy j" is a retraining, "phase i" their soup; the
    model becomes the last soup.

    Args:
        phases: P, how often it is pruned.
        copies: m, retrainings of each phase; 1 is plain iterative magnitude pruning.
        merge: "uniform" or "greedy" (needs `evaluate` on data held out from training and test).
        vary: what differs between copies: "seed", the data order, or the name of an argument of
            `fit` that takes the `values`.
        values: one for each copy, where `vary` is not "seed".
    """

    phases: int = 3
    copies: int = 3
    merge: Literal["uniform", "greedy"] = "uniform"
    vary: str = "seed"
    values: Sequence[float] = ()

    info: ClassVar[MethodInfo] = MethodInfo(
        name="soup",
        title="Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging",
        authors="Zimmer et al.",
        year=2024,
        card="029",
        room="weights",
        kind="driver",
        needs=("training", "data"),
        budget="global",
        cost="`copies` retrainings a phase",
        summary="average retrained copies that share their masks, after every pruning",
    )

    def __post_init__(self) -> None:
        if self.phases < 1 or self.copies < 1:
            raise InvalidArgument(
                f"soup: phases={self.phases} and copies={self.copies} must be at least 1"
            )
        if self.merge not in ("uniform", "greedy"):
            raise InvalidArgument(f"soup: merge={self.merge!r} is not 'uniform' or 'greedy'")
        if (self.vary == "seed") == bool(self.values) or (
            self.values and len(self.values) != self.copies
        ):
            raise InvalidArgument(
                f"soup: vary={self.vary!r} with values={list(self.values)}: name an argument of "
                f"the training function and give {self.copies} values, or vary the seed without"
            )

        if self.vary in _TAKEN:
            raise InvalidArgument(f"soup: vary={self.vary!r} is decided by the method itself")

    def run(self, experiment: Experiment) -> Finished:
        wanted = levels(self.info.name, experiment.sparsity, self.phases, 0.5)
        if self.merge == "greedy" and experiment.evaluate is None:
            raise InvalidArgument("soup: a greedy soup needs `evaluate`, on held-out data")
        normed = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in experiment.model.modules()
        )
        if normed and self.copies > 1 and not experiment.data:
            raise InvalidArgument(
                "soup: the model has batch norm, whose statistics an average must measure anew: "
                "give `data`, batches of the training set"
            )
        experiment.total = self.phases * (self.copies + (self.copies > 1))
        soup: Finished | None = None
        for phase, sparsity in enumerate(wanted):
            parent = experiment.fresh() if soup is None else soup.into(experiment.fresh())
            record = pruned(experiment, parent, sparsity, masks(parent))
            copies = [
                self._copy(experiment, f"phase {phase + 1}, copy {j + 1}", soup, record, phase, j)
                for j in range(self.copies)
            ]
            soup = copies[0]
            if self.copies > 1:
                soup = self._merge(experiment, f"phase {phase + 1}", copies)
        assert soup is not None
        return soup

    def _copy(
        self,
        experiment: Experiment,
        name: str,
        start: Finished | None,
        record: Masks,
        phase: int,
        j: int,
    ) -> Finished:
        seed = experiment.seed + phase * self.copies
        if self.vary == "seed":
            return experiment.train(name, start=start, record=record, seed=seed + j)
        option: dict[str, Any] = {self.vary: self.values[j]}
        return experiment.train(name, start=start, record=record, seed=seed, **option)

    def _merge(self, experiment: Experiment, name: str, copies: Sequence[Finished]) -> Finished:
        data = experiment.data or ()

        def mix(model: nn.Module, taken: Sequence[Finished]) -> nn.Module:
            average(model, [c.into(experiment.fresh()) for c in taken])
            if data:
                reestimate(model, data)
            return model

        def make(model: nn.Module) -> Mapping[str, float]:
            taken = list(copies)
            if self.merge == "greedy":
                taken = self._greedy(experiment, copies, lambda t: mix(experiment.fresh(), t))
            mix(model, taken)
            return {"copies": len(taken)}

        described = {"run": "soup", "merge": self.merge, "of": [c.digest for c in copies]}
        return experiment.once(name, described, make)

    @staticmethod
    def _greedy(
        experiment: Experiment,
        copies: Sequence[Finished],
        mix: Callable[[Sequence[Finished]], nn.Module],
    ) -> list[Finished]:
        """The copies of a greedy soup, best first; alike ones in order."""
        alone = {c.digest: experiment.score(mix([c])) for c in copies}
        ranked = sorted(copies, key=lambda c: -alone[c.digest])
        taken, best = ranked[:1], alone[ranked[0].digest]
        for candidate in ranked[1:]:
            score = experiment.score(mix([*taken, candidate]))
            if score >= best:
                taken, best = [*taken, candidate], score
        return taken


@torch.no_grad()
def average(model: nn.Module, models: Sequence[nn.Module]) -> None:
    """Fill a model with the mean of models that share their masks, and attach these.

    Parameters and floating-point buffers are averaged, in fp32 at least; other buffers are those
    of the first. Masked weights stay exactly 0.

    Args:
        model: to fill; of the same class.
        models: at least one.

    Raises:
        ModelError: the models differ in their masks, so that their mean would be less sparse.
    """
    records = [masks(m) for m in models]
    first = records[0]
    for other in records[1:]:
        if digest_of_masks(other) != digest_of_masks(first):
            raise ModelError(
                "the models keep different weights, so that their average is less sparse than "
                "they are; average copies of one pruned model"
            )
    states: list[Mapping[str, Tensor]] = [m.state_dict() for m in models]
    for name, value in model.state_dict().items():
        if not value.dtype.is_floating_point:
            value.copy_(states[0][name])
            continue
        wide = torch.promote_types(value.dtype, torch.float32)
        value.copy_(sum(s[name].to(value.device, wide) for s in states) / len(states))
    attach(model, first)
    if first is not None:
        first.apply(model)
