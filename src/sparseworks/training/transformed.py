"""The job that takes a model through a method of kind "transform"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import Masks
from sparseworks.core.patterns import Pattern
from sparseworks.models.views import View
from sparseworks.training.attaching import attach_beside
from sparseworks.training.method import Transform
from sparseworks.training.parametrizing import refuse_tied, unparametrize
from sparseworks.training.resuming import resume_transform, state_of_transform

__all__ = ["Transform", "Transformed"]

Part = TypeVar("Part", bound=nn.Module)


class Transformed:
    """A transformed model on its way through training; made by `transform`.

    Attributes:
        model: the model, changed in place.
        views: parameter name -> its matrix view; the name is the one the parameter has after
            `finish`. A method that replaces modules sets the views of the new ones.
        optimizer: after `attach`.
        step: optimizer steps taken.
        skipped: tensor name -> why it is left dense.
        own: what the method keeps between its calls.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Transform,
        views: Iterable[View],
        *,
        sparsity: float | None,
        steps: int | None,
        pattern: Pattern,
        budget: Any,
        seed: int,
    ) -> None:
        self.model, self.method = model, method
        self.views = {v.name: v for v in views}
        self.sparsity, self.steps, self.pattern, self.budget = sparsity, steps, pattern, budget
        self.seed, self.step = seed, 0
        self.optimizer: Optimizer | None = None
        self.skipped: dict[str, str] = {}
        self.finished = False
        self.own: dict[str, Any] = {}
        self._masks: dict[str, Tensor] = {}
        self._orders: dict[str, list[str]] = {}  # parametrized -> its module's parameters in order
        self._replaced: dict[str, nn.Module] = {}
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        self._handle: Any = None
        self._before = {id(p) for p in model.parameters()}

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters under the masks, by the names they had before."""
        return {n: v.parameter for n, v in self.views.items()}

    @property
    def added(self) -> dict[str, nn.Parameter]:
        """The parameters of the parts (scores, gates), by their names in the model now."""
        found = {}
        for name in self._orders:
            prefix = f"{self.views[name].module_name}.parametrizations".lstrip(".")
            for inner, parameter in self.part(name).named_parameters():
                found[f"{prefix}.{self.views[name].attribute}.0.{inner}"] = parameter
        return found

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool mask; all kept where none has been chosen yet."""
        return {n: self._mask(n) for n in self.views}

    @property
    def current_sparsity(self) -> float:
        """Fraction of masked weights right now."""
        counted = None if self.finished else self.method.counted(self)
        if counted is None:
            masks = self.masks.values()
            counted = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
        return 1.0 - counted[0] / max(1, counted[1])

    @property
    def progress(self) -> float:
        """step / steps, at most 1.

        Raises:
            InvalidArgument: the call was not told the number of steps.
        """
        if self.steps is None or self.steps < 1:
            raise InvalidArgument(
                f"method {self.method.info.name!r} follows a schedule: give `steps`, the number of "
                "optimizer steps of the whole training"
            )
        return min(1.0, self.step / self.steps)

    @overload
    def part(self, name: str) -> nn.Module: ...

    @overload
    def part(self, name: str, kind: type[Part]) -> Part: ...

    def part(self, name: str, kind: type[nn.Module] = nn.Module) -> nn.Module:
        """The module that parametrizes a weight, of the class that the method gave it."""
        view = self.views[name]
        parts: Any = view.module.parametrizations
        found = parts[view.attribute][0]
        assert isinstance(found, kind)
        return found

    def parametrize(self, name: str, part: nn.Module) -> None:
        """Compute a weight as `part(weight)` from now on; `finish` folds it back.

        Raises:
            ModelError: the tensor has a second name (tied), which would not see the part.
        """
        view = self.views[name]
        refuse_tied(self.model, view)
        before = (o for n, o in self._orders.items() if self.views[n].module is view.module)
        order = next(before, list(view.module._parameters))
        parametrize.register_parametrization(view.module, view.attribute, part)
        self._orders[name] = order

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of one, for good."""
        parent, _, child = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        self._replaced.setdefault(name, self.model.get_submodule(name))
        setattr(owner, child, module)

    def freeze(self, module: nn.Module, attribute: str) -> None:
        """A parameter does not train until `finish`."""
        parameter = module._parameters.get(attribute)
        if parameter is not None:
            parameter.requires_grad_(False)

    def train_only(self, what: Literal["parts", "model"]) -> None:
        """From now on only the parts' parameters take gradients, or only those of before.

        The others lose the gradient they have: a zero one would still decay and move by momentum.

        Raises:
            InvalidArgument: several processes train together; DDP reduces the gradients of a set of
                parameters that must not change.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise InvalidArgument(
                f"method {self.method.info.name!r} trains scores and weights in turn, which does "
                "not work with several processes (DDP); train it in one"
            )
        parts = list(self.added.values())
        for group, trains in ((parts, what == "parts"), (self._trainable, what == "model")):
            for parameter in group:
                parameter.requires_grad_(trains)
                if not trains:
                    parameter.grad = None

    def set_mask(self, name: str, mask: Tensor) -> None:
        """A new mask, into the part's buffer where it has one."""
        if name in self._orders and isinstance(getattr(self.part(name), "mask", None), Tensor):
            self.part(name).mask.copy_(mask)  # type: ignore[operator]
        else:
            self._masks[name] = mask.clone()

    def parameter_groups(self, **added: Any) -> list[dict[str, Any]]:
        """Two groups for an optimizer: the trainable parameters of before, and those added.

        Args:
            added: settings of the second group (lr=...); its weight decay is 0 unless given, since
                decay of scores would shift their ranks.
        """
        new = {id(p) for p in self.added.values()}
        trainable = [p for p in self.model.parameters() if p.requires_grad or id(p) in new]
        groups = [
            {"params": [p for p in trainable if id(p) not in new]},
            {"params": [p for p in trainable if id(p) in new], "weight_decay": 0.0, **added},
        ]
        return [g for g in groups if g["params"]]

    def attach(self, optimizer: Optimizer) -> Transformed:
        """Follow an optimizer: after each of its steps `update` runs. Returns the job itself.

        Raises:
            InvalidArgument: attached before, or the optimizer lacks what the transform added.
        """
        if self.optimizer is not None or self.finished:
            state = "finished" if self.finished else "already attached to an optimizer"
            raise InvalidArgument(f"this transform is {state}; transform the model again")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        brought = {n: p for n, p in self.model.named_parameters() if id(p) not in self._before}
        trains = [n for n, p in brought.items() if p.requires_grad or n in self.added]
        lacking = [n for n in trains if id(brought[n]) not in held]
        if lacking:
            raise InvalidArgument(
                f"the optimizer does not hold {lacking[0]!r}, which the transform added; build the "
                "optimizer after `transform`"
            )
        self.optimizer = optimizer
        self.method.attached(self)
        self._handle = optimizer.register_step_post_hook(self._after_step)
        here = {id(p) for p in self.model.parameters()}
        self._trainable = [p for p in self._trainable if id(p) in here]
        self._replaced.clear()  # what was replaced may be as large as the model
        return self

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        self.method.update(self)

    def penalty(self) -> Tensor:
        """What to add to the loss of this step; 0 where the method has none."""
        found = None if self.finished else self.method.penalty(self)
        device = next((p.device for p in self.model.parameters()), None)
        return torch.zeros((), device=device) if found is None else found

    @torch.no_grad()
    def finish(self) -> Masks:
        """End the training: parts folded into ordinary weights, zeros exact, the mask record on.

        A weight becomes what the layer computed with where its mask keeps it, and 0 elsewhere.
        """
        if not self.finished:
            self.method.finish(self)
            masks = {n: self._mask(n).clone() for n in self.views}
            for name, mask in masks.items():
                view = self.views[name]
                weight = getattr(view.module, view.attribute).detach().clone()
                self._unparametrize(name)
                view.parameter.copy_(weight.masked_fill_(~mask, 0.0))
            self._masks = masks
            self._replaced.clear()
            self._release()
            self.finished = True
            attach_beside(self.model, self.record())
        return self.record()

    def record(self) -> Masks:
        """The masks as they are now."""
        return Masks.of(self.masks, self.method.info.name, str(self.pattern))

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the model's and the optimizer's own state."""
        return state_of_transform(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, bit for bit; load model and optimizer first.

        Raises:
            InvalidArgument: the state is of another method, schedule or of other tensors.
        """
        resume_transform(self, state)

    def undo(self) -> None:
        """Give the model back as it was before `transform` (only before training)."""
        for name in list(self._orders):
            self._unparametrize(name)
        for name, module in self._replaced.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, module)
        self._replaced.clear()
        self._release()
        self.finished = True

    def _mask(self, name: str) -> Tensor:
        if name in self._orders:
            mask = getattr(self.part(name), "mask", None)
            if isinstance(mask, Tensor):
                return mask
        if name in self._masks:
            return self._masks[name]
        return torch.ones_like(self.views[name].parameter, dtype=torch.bool)

    def _unparametrize(self, name: str) -> None:
        """Only the raw weight stays, at its old place among the module's parameters."""
        order = self._orders.pop(name, None)
        if order is not None:
            unparametrize(self.views[name].module, self.views[name].attribute, order)

    def _release(self) -> None:
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
