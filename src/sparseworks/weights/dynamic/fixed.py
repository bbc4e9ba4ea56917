"""Fixed masks: fine-tune a sparse model; every zero stays zero.

After every step w <- w * m, m the mask of the model's record; gradients and the optimizer's state
are masked alike.

Source: Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks (its
retraining of what is kept).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparseworks.core.masks import masks
from sparseworks.core.registry import MethodInfo
from sparseworks.models.hooks import with_torch_masks
from sparseworks.training.hooked import Hooked, Run
from sparseworks.training.names import unwrapped


@dataclass(frozen=True)
class Fixed(Hooked):
    """Train the kept weights of the model's mask record."""

    starts_from_record: ClassVar[bool] = True
    info: ClassVar[MethodInfo] = MethodInfo(
        name="fixed",
        title="Fine-tuning with fixed masks (baseline)",
        authors="Han et al.",
        year=2015,
        room="weights",
        kind="hooked",
        needs=("training",),
        pattern="that of the record",
        budget="that of the record",
        cost="a mask per step",
        summary="fine-tune from the mask record; every zero stays zero",
        command="sparseworks train MODEL --data DATA --method fixed --start SPARSE --out OUT",
    )

    def begin(self, run: Run) -> None:
        model = unwrapped(run.model)
        record = with_torch_masks(model, masks(model))
        assert record is not None
        for name in run.masks:
            run.masks[name] = record[name].to(run.masks[name].device)
