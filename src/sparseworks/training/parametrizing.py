"""Putting modules on weights with `torch.nn.utils.parametrize`, and taking them off."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from sparseworks.core.errors import ModelError
from sparseworks.models.views import View

__all__ = ["refuse_tied", "unparametrize"]


def refuse_tied(model: nn.Module, view: View) -> None:
    """A weight with a second name cannot be parametrized.

    Raises:
        ModelError: it has one.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is view.parameter and name != view.name:
            raise ModelError(
                f"{view.name} is also {name} (tied weights): a parametrization would reach only "
                "one of them; exclude it"
            )


def unparametrize(view: View, order: Sequence[str]) -> None:
    """Only the raw weight stays, at its old place among the module's parameters.

    Args:
        view: of the weight.
        order: names of the module's parameters before any was parametrized.
    """
    parametrize.remove_parametrizations(view.module, view.attribute, leave_parametrized=False)
    known = view.module._parameters
    for attribute in order:
        if attribute in known:  # others of the module may still be parametrized
            known[attribute] = known.pop(attribute)
