"""Is a comparison of sparse methods fair? An audit of recorded runs.

The rules are those that the literature on sparse networks keeps tripping over (Liu & Wang 2023, Ten
Lessons We Have Learned in the New "Sparseland"; the selection and the thresholds are ours): the
same training cost, as the papers count it,

    C = sum over steps and samples of 3 f_s, 2 f_s + f_d where a dense gradient is needed, 3 f_d
        dense; all rounds and the training of the starting weights included,

the same data, schedule and start, equally tuned arms, scores that nothing was chosen on, several
seeds, sparsity that is counted and over the same layers, speed that is measured.

In our quick setting (claim 082: ResNet-20 on digits) the recorded costs equal closed formulas, and
tickets lose 1.3 points of their lead from equal epochs to equal cost (0.6 to 2.0).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.diagnostics.arms import Arm, Source, read_arms
from sparseworks.diagnostics.checks import Check, Limits
from sparseworks.diagnostics.measurement import Measurement
from sparseworks.diagnostics.rules import TRAINING
from sparseworks.diagnostics.rules_of_results import RESULTS

__all__ = ["Audit", "FairComparison", "audit"]


@dataclass(frozen=True)
class Audit:
    """What was found.

    Args:
        arms: what was compared.
        checks: one row per rule.
    """

    arms: tuple[Arm, ...]
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Literal["fair", "unfair", "unknown"]:
        """Unfair where any check is, else unknown where any is."""
        found = {c.verdict for c in self.checks}
        return "unfair" if "unfair" in found else "unknown" if "unknown" in found else "fair"

    def __getitem__(self, name: str) -> Check:
        """The check of this name."""
        return {c.name: c for c in self.checks}[name]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "verdict": self.verdict,
            "arms": [{"name": a.name, "runs": [dict(r) for r in a.runs]} for a in self.arms],
            "checks": [asdict(c) for c in self.checks],
        }

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {', '.join(a.name for a in self.arms)}"]
        for c in self.checks:
            lines.append(f"  {c.verdict:<7} {c.name}: {c.reason}")
            if c.advice:
                lines.append(f"          {c.advice}")
        return "\n".join(lines)


def audit(runs: Iterable[Source], *, cost: float = 0.05, seeds: int = 3) -> Audit:
    """Say of every rule whether a comparison keeps it, why, and what to do.

    Args:
        runs: folders of `sparseworks train`, `tickets` or `prune`, "name=folder", files of
            descriptions, or descriptions themselves (see `sparseworks.diagnostics.arms`). Runs
            that differ in the seed alone are one arm.
        cost: relative difference of multiply-adds that counts as equal.
        seeds: fewest of an arm.

    Raises:
        InvalidArgument: fewer than two arms, or a source or fact that is not there.
        DataError: a file cannot be read.
    """
    limits = Limits(cost=cost, seeds=seeds)
    arms = read_arms(runs)
    if len(arms) < 2:
        raise InvalidArgument(
            f"a comparison has at least two arms, here {[a.name for a in arms]}: runs that differ "
            "in the seed alone are one arm; give 'name=folder' to tell others apart"
        )
    return Audit(tuple(arms), tuple(check(arms, limits) for check in (*TRAINING, *RESULTS)))


@dataclass(frozen=True)
class FairComparison(Measurement):
    """The audit as a method with options: `FairComparison()(runs)`; see `sw.audit`.

    Args:
        cost: relative difference of multiply-adds that counts as equal.
        seeds: fewest of an arm.
    """

    cost: float = 0.05
    seeds: int = 3

    info: ClassVar[MethodInfo] = MethodInfo(
        name="fair-comparison",
        title='Ten Lessons We Have Learned in the New "Sparseland": A Short Handbook for Sparse '
        "Neural Network Researchers",
        authors="Liu & Wang",
        year=2023,
        card="082",
        room="diagnostics",
        kind="measurement",
        pattern="any",
        budget="any",
        cost="reads records; no training",
        summary="is a comparison of sparse methods fair: costs, schedules, seeds, layers, speed",
        call="sw.audit(runs)",
        command="sparseworks audit RUN RUN --out OUT.json",
    )

    def __call__(self, runs: Iterable[Source]) -> Audit:
        """Audit the runs."""
        return audit(runs, cost=self.cost, seeds=self.seeds)
