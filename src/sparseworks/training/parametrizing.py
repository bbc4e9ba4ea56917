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


def unparametrize(module: nn.Module, attribute: str, order: Sequence[str]) -> None:
    """Only the raw weight stays, at its old place among the module's parameters.

    Args:
        module: it holds the weight.
        attribute: name of the weight there.
        order: names of the module's parameters before any was parametrized.
    """
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
    known = module._parameters
    for name in order:
        if name in known:  # others of the module may still be parametrized
            known[name] = known.pop(name)
