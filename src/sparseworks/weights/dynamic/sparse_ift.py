"""Sparse-IFT (Thangarasa et al. 2023, Sparse Iso-FLOP Transformations for Maximizing Training
Efficiency).

A layer becomes a larger one at sparsity s with as many multiply-adds: sparsity buys width instead
of savings. Four members, with density 1 - s:

- "wide": every hidden width times sqrt(1/(1 - s)), then the one s for all masked layers at which
  the cost is that of before (the paper keeps stem and classifier dense, `exclude=` the stem, so
  that it is a little above the s of the width). Where widths are pinned by the graph (zero-padded
  shortcuts) the caller gives the wide model and the `dense` one that it replaces;
- "parallel": sum over 1/(1 - s) branches of norm(layer(x));
- "factorized": V f(U x), both sparse;
- "doped": sparse layer + V(U x), U and V dense, of the freed cost.

The masks are sparse from the first step and move as RigL's do (or SET's, or not at all), with the
same density in every layer.

In our quick setting (claim 003: perceptrons on digits, width 64 for 16, 40 epochs) "wide" with RigL
is 1.7 points below the dense network of equal cost (-3.0 to -0.4), and 1.7 above static masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Batch
from sparseworks.models.views import View, find_prunable
from sparseworks.training.delegated import Delegated, sparsified
from sparseworks.training.hooked import Run
from sparseworks.training.transforming import Transformed
from sparseworks.weights.dynamic.isoflop import (
    Doped,
    Factorized,
    Parallel,
    common_sparsity,
    model_macs,
)
from sparseworks.weights.dynamic.widening import widen

_MEMBERS = ("wide", "parallel", "factorized", "doped")
_REWIRINGS = ("rigl", "set", "static")


@dataclass(frozen=True, kw_only=True)
class SparseIFT(Delegated):
    """Spend sparsity on larger layers at the cost of the dense model.

    Args:
        member: which transformation, see above.
        rewire: how the masks move: "rigl", "set" or "static".
        every: steps between mask updates; None: `sw.schedules.interval(steps)`.
        fraction: share of active weights moved at first.
        end: fraction of the training after which the masks are fixed.
        dense: "wide": the model whose cost the one given, already wide, must match; None: the
            one given is widened, its weights drawn anew.
        example: "wide": one batch, to trace the model and count costs on.
    """

    member: str = "wide"
    rewire: str = "rigl"
    every: int | None = None
    fraction: float = 0.3
    end: float = 0.75
    dense: nn.Module | None = field(default=None, repr=False, compare=False)
    example: Batch | None = field(default=None, repr=False, compare=False)

    needs_sparsity: ClassVar[bool] = False
    info: ClassVar[MethodInfo] = MethodInfo(
        name="sparse-ift",
        title="Sparse Iso-FLOP Transformations for Maximizing Training Efficiency",
        authors="Thangarasa et al.",
        year=2023,
        card="003",
        room="weights",
        kind="transform",
        needs=("training",),
        budget="uniform",
        cost="that of the dense model, if zeros are skipped",
        summary="larger sparse layers at the cost of the dense model",
    )

    def __post_init__(self) -> None:
        if self.member not in _MEMBERS or self.rewire not in _REWIRINGS:
            raise InvalidArgument(
                f"sparse-ift: member={self.member!r}, rewire={self.rewire!r}; use one of "
                f"{', '.join(_MEMBERS)} and one of {', '.join(_REWIRINGS)}"
            )

    def begin(self, job: Transformed) -> None:
        if self.rewire != "static" and job.steps is None:
            raise InvalidArgument("method 'sparse-ift' moves its masks on a schedule: give `steps`")
        if self.member == "wide":
            self._match(job)
            return
        if job.sparsity is None or job.sparsity == 0:
            raise InvalidArgument(f"sparse-ift: member {self.member!r} needs `sparsity` above 0")
        for view in job.views.values():
            self._check(view)
        names = [n for v in list(job.views.values()) for n in self._enlarge(job, v)]
        job.views = find_prunable(job.model, include=names).by_name()

    def _match(self, job: Transformed) -> None:
        if self.example is None or (self.dense is None and job.sparsity is None):
            raise InvalidArgument(
                "sparse-ift: member 'wide' needs `example`, one batch to count costs on, and "
                "either `sparsity` (the model is widened) or `dense` (the model is the wide one)"
            )
        for view in job.views.values():
            self._check(view)
        if self.dense is not None:
            cost = model_macs(self.dense, self.example)
            matched = common_sparsity(job.model, job.views.values(), cost, self.example)
            if job.sparsity is not None and abs(job.sparsity - matched) > 5e-4:
                raise InvalidArgument(
                    f"sparse-ift: sparsity={job.sparsity} does not give equal cost, {matched:.6f} "
                    "does; leave `sparsity` out"
                )
            job.sparsity = matched
            return
        assert job.sparsity is not None
        cost = model_macs(job.model, self.example)
        factor = (1 / (1 - job.sparsity)) ** 0.5
        backup = widen(job.model, self.example, factor, job.seed)
        try:
            job.sparsity = common_sparsity(job.model, job.views.values(), cost, self.example)
        except InvalidArgument:
            backup.restore()
            raise

    def _check(self, view: View) -> None:
        if view.layout not in ("linear", "conv") or view.groups != 1:
            raise InvalidArgument(
                f"sparse-ift: {view.name} is {view.layout} with {view.groups} groups; only linear "
                "layers and convolutions of one group can be enlarged, exclude it"
            )
        if not view.parameter.requires_grad:
            raise InvalidArgument(
                f"sparse-ift: {view.name} is frozen (requires_grad=False); exclude it"
            )

    def _enlarge(self, job: Transformed, view: View) -> list[str]:
        """Replace one layer; the names of the weights to mask."""
        name, sparsity = view.module_name, job.sparsity or 0.0
        layer: Any = view.module
        if self.member == "parallel":
            after = _following_norm(job.model, view)
            branches = round(1 / (1 - sparsity))
            norm = job.model.get_submodule(after)
            job.replace(name, Parallel(layer, norm, branches, job.seed, name))
            job.replace(after, nn.Identity())
            return [f"{name}.branches.{i}.0.weight" for i in range(branches)]
        if self.member == "factorized":
            job.replace(name, Factorized(layer, sparsity, job.seed, name))
            return [f"{name}.first.weight", f"{name}.second.weight"]
        job.replace(name, Doped(layer, sparsity, job.seed, name))
        return [f"{name}.layer.weight"]

    def start(self, job: Transformed) -> Run:
        options: dict[str, Any] = {} if self.rewire == "static" else {
            "every": self.every, "fraction": self.fraction, "end": self.end
        }  # fmt: skip
        return sparsified(job, self.rewire, **options)


def _following_norm(model: nn.Module, view: View) -> str:
    """The batch norm that follows a layer among its parent's children."""
    parent, _, child = view.module_name.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    place = [n for n, _ in children].index(child) + 1
    for name, module in children[place : place + 1]:
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and module.num_features == view.parameter.shape[0]:
            return f"{parent}.{name}".lstrip(".")
    raise InvalidArgument(
        f"sparse-ift: no batch norm follows {view.module_name}, without which parallel branches "
        "would add up to one layer; exclude it, or use member 'factorized'"
    )
