"""Methods for sparse activations at equal measured shares of weights that tokens do not touch.

share = 1 - touched / all, in percent of the weights of the linear layers of all blocks. An average
token touches the columns of its active inputs, or the rows and columns of its active channels, the
low-rank parts, and the whole of every layer that a method leaves alone. Sparsity on calibration
data is not that share: gates change what later layers read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparseworks.activations.calibrating import Job
from sparseworks.activations.method import ActivationMethod, InputMethod
from sparseworks.activations.rotation import RotatedGate
from sparseworks.activations.running import SparseActivations
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import build
from sparseworks.models.active import Gate, attached

__all__ = ["CountedActivations"]

_CLOSE, _LIMIT, _TRIES = 0.2, 0.5, 8  # points, points, measurements


class CountedActivations:
    """A method calibrated once, with gates for every sparsity, and the share they leave untouched.

    Args:
        method, options: as `sparse_activations` takes them.
        job: the model with its calibration data.
        turns: whether the matrices of rotations count as touched, `[in, in]` for inputs that
            several layers read together.

    Attributes:
        whole: weights of all layers of the job.
        governed: of those that gates act on.
        turns: of the rotations that count.
    """

    def __init__(self, method: str, options: Mapping[str, Any], job: Job,
                 turns: bool = False) -> None:  # fmt: skip
        self.method, self.options, self.job = method, dict(options), job
        self._make = self._maker()
        self.whole = sum(v.parameter.numel() for v in job.views)
        run = self.gates(0.5)
        self.governed = sum(x.weights for x in run.layers())
        sizes = {id(g.turn): g.turn.numel() for g in run.gates.values()
                 if isinstance(g, RotatedGate)}  # fmt: skip
        self.turns = sum(sizes.values()) if turns else 0

    def _maker(self) -> Callable[[float], dict[str, Gate]]:
        made = build(self.method, **self.options)
        assert isinstance(made, ActivationMethod)
        if isinstance(made, InputMethod):
            with torch.no_grad():
                families = made.families(self.job)
            return lambda sparsity: {n: f(sparsity) for ns, f in families.items() for n in ns}

        def again(sparsity: float) -> dict[str, Gate]:
            self.job.sparsity = sparsity
            return made.gates(self.job)

        return again

    @property
    def most(self) -> float:
        """The share that no sparsity exceeds, in percent."""
        return 100 * (self.governed - self.turns) / self.whole

    def gates(self, sparsity: float) -> SparseActivations:
        """Gates for a sparsity, off the model."""
        about = {"sparsity": sparsity, **self.options}
        with torch.no_grad():
            run = SparseActivations(self.job.model, self.method, about, self._make(sparsity))
        run.remove()
        return run

    def measured(self, run: SparseActivations, use: Callable[[], object]) -> float:
        """The share that gates leave while `use` runs the model; they are on it as long."""
        run.reset()
        with attached((run.model.get_submodule(n), gate) for n, gate in run.gates.items()):
            use()
        return self.share(run)

    def share(self, run: SparseActivations) -> float:
        """Percent of the weights that an average token did not touch since `reset`."""
        needed = sum(x.needed for x in run.layers()) + self.turns
        return 100 * (self.governed - needed) / self.whole

    def reach(self, goal: float, use: Callable[[], object],
              start: float | None = None) -> tuple[SparseActivations, float]:  # fmt: skip
        """Gates whose measured share is nearest to a goal, and that share.

        Stops at 0.2 points from the goal, or after 8 measurements. The gates are off the model; the
        sparsity by which they were made is in their `options`.

        Args:
            goal: percent.
            use: runs the model on the data by which the share is measured.
            start: the sparsity to try first.

        Raises:
            InvalidArgument: a goal that the method cannot reach, or none within 0.5 points.
        """
        if goal >= self.most:
            raise InvalidArgument(
                f"{self.method} cannot leave {goal} % of the weights untouched: {self.most:.1f} % "
                "are behind its gates"
            )
        asked = (goal / 100 * self.whole + self.turns) / self.governed if start is None else start
        tried: set[float] = set()
        best, found = None, 0.0
        while asked not in tried and len(tried) < _TRIES:
            tried.add(asked)
            run = self.gates(asked)
            share = self.measured(run, use)
            if best is None or abs(share - goal) < abs(found - goal):
                best, found = run, share
            if abs(share - goal) <= _CLOSE:
                break
            asked += (goal - share) / 100 * self.whole / self.governed
            asked = min(max(asked, 0.0), 0.9999)
        if best is None or abs(found - goal) > _LIMIT:
            raise InvalidArgument(
                f"{self.method}: no sparsity leaves {goal} % of the weights untouched; the nearest "
                f"of {len(tried)} leaves {found:.2f} %: choose another goal"
            )
        return best, found
