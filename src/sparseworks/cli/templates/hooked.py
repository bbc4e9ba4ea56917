"""own-method: what it does, in a line; then the equation and where it is from.

    s(t) = s t / (end T)   for t <= end T, then s

After every `every` optimizer steps the smallest |w| are masked, so that the sparsity rises in a
straight line to s; T are all steps. A masked weight stays exactly 0.

    sparseworks train MODEL --plugin own_method.py --method own-method --sparsity 0.9 \\
        --data DATA --out OUT
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sparseworks as sw
from sparseworks.training.hooked import Periodic, Run
from sparseworks.weights.dynamic.masks import check_fraction, magnitudes, select_masks, span


@sw.register
@dataclass(frozen=True)
class OwnMethod(Periodic):
    """Mask ever more of the smallest weights while the model trains.

    Args:
        end: fraction of the training at which the sparsity is reached.
    """

    end: float = 0.5

    info: ClassVar[sw.MethodInfo] = sw.MethodInfo(
        name="own-method",
        title="The title of the paper, or of your idea",
        authors="-",
        year=2026,
        room="own",
        kind="hooked",
        needs=("training",),
        cost="one selection every `every` steps",
        summary="the smallest |w| go, ever more of them, in a straight line",
    )

    def __post_init__(self) -> None:
        check_fraction("own-method", end=self.end)
        super().__post_init__()

    def begin(self, run: Run) -> None:
        """The first masks, `run.masks[name]`; here nothing is masked yet."""
        span(run, 0.0, self.end)  # refuses a run that was not told its number of steps

    def update(self, run: Run) -> None:
        """After every optimizer step, `run.step` counted from 1."""
        _, last = span(run, 0.0, self.end)
        if run.step == last or (run.step < last and run.step % run.every == 0):
            select_masks(run, self.scores(run), (run.sparsity or 0.0) * run.step / last)

    def scores(self, run: Run) -> dict[str, Any]:
        """A matrix [out, in] per tensor, higher = keep; -inf where masked, so that masks shrink."""
        return magnitudes(run)
