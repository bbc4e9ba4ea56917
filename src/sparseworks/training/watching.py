"""What masks do while a model trains: the sparsity of every tensor, churn, and the loss beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.core.masks import Masks
from sparseworks.training.logs import Log, figures_of

__all__ = ["Changes", "Masked", "Trace"]


class Masked(Protocol):
    """What has masks now: a run of `sparsify` or a job of `transform`."""

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool mask."""


class Changes:
    """Sparsity and flips (as `Trace` has them) since the look before; holds a bool per weight."""

    def __init__(self, run: Masked) -> None:
        self.run = run
        self._last = {n: m.clone() for n, m in run.masks.items()}

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """`sparsity` and `flips`; empty where nothing is masked yet."""
        now = self.run.masks
        total = sum(m.numel() for m in now.values())
        if not total:
            return {}
        kept = sum(int(torch.count_nonzero(m)) for m in now.values())
        flips = _differing(now, self._last)
        self._last = {n: m.clone() for n, m in now.items()}
        return {"sparsity": 1 - kept / total, "flips": flips / total}


def _differing(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> int:
    return sum(int(torch.count_nonzero(m ^ others[n])) for n, m in masks.items())


class Trace:
    """Rows of numbers, one for every look at a training.

    A row holds `step`, `loss` (mean of the steps since the look before) and, with masks,

        tensors   zeros of each tensor, as a fraction, in the order of `names`
        sparsity  of all of them together
        churn     |kept now, not at the look before| / |kept now|
        flips     |kept now or at the look before, not both| / |all| (Zhou et al. 2021, Learning N:M
                  Fine-grained Structured Sparse Neural Networks From Scratch: SAD, per weight)
        moved     the same against the first masks
        explored  |kept at any look| / |all|  (Liu et al. 2021, Do We Actually Need Dense
                  Over-Parameterization: the in-time over-parametrization rate)

    Args:
        run: whose masks; None: the loss only.
        every: steps between looks.
        log: where every row goes too, as `figures_of` names it.
    """

    def __init__(self, run: Masked | None, every: int = 1, log: Log | None = None) -> None:
        if every < 1:
            raise InvalidArgument(f"every={every} must be at least 1")
        self.run, self.every, self.log = run, every, log
        self.rows: list[dict[str, Any]] = []
        masks = {} if run is None else run.masks
        self.names = list(masks)
        self._last = {n: m.clone() for n, m in masks.items()}
        self._ever = {n: m.clone() for n, m in masks.items()}
        self._first = {n: m.clone() for n, m in masks.items()}
        self._loss: Tensor | float = 0.0
        self._steps = 0

    @torch.no_grad()
    def look(self, step: int, loss: Tensor | float = 0.0) -> dict[str, Any] | None:
        """Take one step into account; returns the new row where one is due."""
        self._loss, self._steps = self._loss + loss, self._steps + 1
        if step % self.every:
            return None
        row: dict[str, Any] = {"step": step, "loss": float(self._loss) / self._steps}
        self._loss, self._steps = 0.0, 0
        if self.run is not None:
            row |= self._masks()
        self.rows.append(row)
        if self.log is not None:
            self.log.write(step, figures_of(row, self.names))
        return row

    def _masks(self) -> dict[str, Any]:
        assert self.run is not None
        now = self.run.masks
        if not now:  # what is sparse is no masked parameter yet
            return {}
        kept = {n: int(torch.count_nonzero(m)) for n, m in now.items()}
        flips, moved, new = _differing(now, self._last), _differing(now, self._first), 0
        for name, mask in now.items():
            new += int(torch.count_nonzero(mask & ~self._last[name]))
            self._ever[name] = self._ever[name] | mask
            self._last[name] = mask.clone()
        total = max(1, sum(m.numel() for m in now.values()))
        ever = sum(int(torch.count_nonzero(m)) for m in self._ever.values())
        return {
            "tensors": [1 - kept[n] / max(1, now[n].numel()) for n in self.names],
            "sparsity": 1 - sum(kept.values()) / total,
            "churn": new / max(1, sum(kept.values())),
            "explored": ever / total,
            "flips": flips / total,
            "moved": moved / total,
        }

    def report(self) -> dict[str, Any]:
        """JSON values: `every`, `names`, `rows`."""
        return {"every": self.every, "names": self.names, "rows": self.rows}

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on needs; masks take a bit per weight."""
        held = (self._last, self._ever, self._first)
        last, ever, first = (Masks.of(masks).state_dict() for masks in held)
        return {
            "rows": [dict(row) for row in self.rows],
            "loss": float(self._loss),
            "steps": self._steps,
            "last": last,
            "ever": ever,
            "first": first,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            CheckpointError: the state is of other tensors.
        """
        older = {"first": state["last"], **state}  # states of older versions lack the first masks
        held = [Masks.from_state_dict(older[key]) for key in ("last", "ever", "first")]
        if any(set(masks) != set(self.names) for masks in held):
            raise CheckpointError("the trace of the checkpoint is of other tensors than these")
        for name in self.names:
            device = self._last[name].device
            last, ever, first = (masks[name].to(device) for masks in held)
            self._last[name], self._ever[name], self._first[name] = last, ever, first
        self.rows = [dict(row) for row in state["rows"]]
        self._loss, self._steps = float(state["loss"]), int(state["steps"])
