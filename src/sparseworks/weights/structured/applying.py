"""Cut what was chosen: checked against zeroing first, means folded, the config brought along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.models.blocks import first_tensor
from sparseworks.models.calls import Batch, call
from sparseworks.models.coupling import Coupling
from sparseworks.weights.structured.backup import Backup, Change
from sparseworks.weights.structured.configs import contradictions, describe, has_config
from sparseworks.weights.structured.cutting import cut, zero
from sparseworks.weights.structured.folding import fold as fold_means
from sparseworks.weights.structured.folding import fold_linear
from sparseworks.weights.structured.planning import Keep, Plan, cut_shapes, shapes_of

__all__ = ["apply_cut", "check", "output_of"]


def apply_cut(
    model: nn.Module, example: Batch, coupling: Coupling, keep: Keep, plan: Plan, backup: Backup
) -> tuple[list[Change], dict[str, Any] | None]:
    before = shapes_of(model)
    after = cut_shapes(before, coupling, keep)
    fields = None
    if plan.uniform and has_config(model):
        fields = describe(model, before, after)
        if fields is None:
            raise ModelError(
                f"no config of {type(model).__name__} describes these widths; use uniform=False"
            )
    if plan.verify:
        check(model, example, coupling, keep)
    if plan.fold != "none":
        data = plan.data if plan.data is not None else [example]
        if plan.fold == "linear":
            fold_linear(model, coupling, keep, data, backup)
        else:
            fold_means(model, coupling, keep, data, backup, plan.fold == "exact")
    changes, _ = cut(model, coupling, keep, backup)
    for path, value in (fields or {}).items():
        *parents, name = path.split(".")
        owner: Any = model.config
        for parent in parents:
            owner = getattr(owner, parent)
        backup.set(owner, name, value)
    if fields is not None and (wrong := contradictions(model, changes)):
        raise ModelError(
            f"the config of {type(model).__name__} would not rebuild this model ({wrong[0]}); "
            "use uniform=False"
        )
    return changes, fields


@torch.no_grad()
def check(model: nn.Module, example: Batch, coupling: Coupling, keep: Keep) -> None:
    """Cutting must equal zeroing (where no statistic runs over what is cut), and must run."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    saved = zero(model, coupling, keep)
    try:
        expected = output_of(model, example)
    finally:
        for parameter, value in saved:
            parameter.copy_(value)
    backup = Backup()
    try:
        cut(model, coupling, keep, backup)
        found = output_of(model, example)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run with its new shapes ({error}); a module may hold "
            "a size under a name that is not known: exclude= the layers it belongs to"
        ) from error
    finally:
        backup.restore()
        for module, was in training.items():
            module.training = was
    exact = all(f.exact or bool(keep[f.roots].all()) for f in coupling.families)
    scale = float(expected.abs().max()) + 1e-12
    if exact and float((found - expected).abs().max()) > 2e-3 * scale:
        raise ModelError(
            f"{type(model).__name__}: the cut model differs from the zeroed one by "
            f"{float((found - expected).abs().max()) / scale:.1e}; please report this architecture"
        )


def output_of(model: nn.Module, example: Batch) -> Tensor:
    """The logits, or the first tensor that the model returns, fp32."""
    output = call(model, example)
    found = getattr(output, "logits", None)
    tensor = found if isinstance(found, Tensor) else first_tensor(output)
    if tensor is None:
        raise ModelError(f"no tensor in the output of {type(model).__name__}")
    return tensor.detach().float()
