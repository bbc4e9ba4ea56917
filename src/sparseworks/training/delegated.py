"""Transforms whose masks an inner run chooses, once the optimizer is known."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparseworks.core.errors import InvalidArgument
from sparseworks.training.hooked import Run
from sparseworks.training.method import Hooked
from sparseworks.training.sparsify import sparsify
from sparseworks.training.transforming import Transform, Transformed

__all__ = ["Delegated", "sparsified"]


@dataclass(frozen=True, kw_only=True)
class Delegated(Transform):
    """Base of transforms that change modules themselves and leave masks to a run of `sparsify`."""

    @abstractmethod
    def start(self, job: Transformed) -> Run:
        """The run, started."""

    def name_of(self, job: Transformed, name: str) -> str:
        """What the run calls a tensor of the job."""
        return name

    def attached(self, job: Transformed) -> None:
        job.own["run"] = self.start(job)
        self.update(job)

    def update(self, job: Transformed) -> None:
        masks = self.run_of(job).masks
        for name in job.views:
            if (mask := masks.get(self.name_of(job, name))) is not None:
                job.set_mask(name, mask)

    def finish(self, job: Transformed) -> None:
        self.run_of(job).finish()
        self.update(job)

    def state_dict(self, job: Transformed) -> dict[str, Any]:
        return {"run": self.run_of(job).state_dict()}

    def load_state_dict(self, job: Transformed, state: Mapping[str, Any]) -> None:
        self.run_of(job).load_state_dict(state["run"])
        self.update(job)

    def run_of(self, job: Transformed) -> Run:
        """The run of a job.

        Raises:
            InvalidArgument: there is none before the optimizer is known.
        """
        run = job.own.get("run")
        if not isinstance(run, Run):
            raise InvalidArgument(
                f"{self.info.name}: call `attach(optimizer)` first; masks start there"
            )
        return run


def sparsified(job: Transformed, method: str | Hooked, **options: Any) -> Run:
    """A run over the job's tensors, with its sparsity, pattern, budget, steps and seed."""
    assert job.optimizer is not None
    return sparsify(
        job.model,
        job.optimizer,
        method,
        sparsity=job.sparsity,
        steps=job.steps,
        pattern=job.pattern,
        budget=job.budget,
        include=list(job.views),
        seed=job.seed,
        **options,
    )
