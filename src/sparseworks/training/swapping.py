"""The run of a straight-through training: all weights in the optimizer's hands, N:M in the layers.

See `straight_through` for what it computes. The weights change places around the optimizer's step,
in its pre-step and post-step hooks; where the step is given a closure, that is wrapped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparseworks.core.budgets import get_budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import Masks
from sparseworks.core.patterns import Pattern
from sparseworks.kernels.zeroing import keep_only
from sparseworks.models.views import View
from sparseworks.training.hooked import Run
from sparseworks.training.sharding import is_sharded, local_mask, local_part, whole
from sparseworks.training.straight_through import StraightThrough

__all__ = ["StraightThroughRun"]


class StraightThroughRun(Run):
    """One straight-through training; made by `sparsify`.

    Its masks are those that layers compute with now; theta is part of the saved state. A weight
    that is written from outside between steps (loaded, say) is theta from then on, where it is not
    what the layers computed with already.
    """

    method: StraightThrough

    def start(self) -> None:
        self._hard = False  # M alone counts: the training is over
        self._inside: set[int] = set()  # optimizers in whose step theta is in the parameters
        self._whole: set[str] = set()  # parameters that hold theta now
        self._shown: dict[str, int] = {}  # the version of a parameter when W was put into it
        self._hidden: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}  # gradients taken away
        self._bind()
        for name, parameter in self._bound.items():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                raise InvalidArgument(
                    f"{name} is {parameter.dtype}: small steps of masked weights would be rounded "
                    "away; keep weights in fp32 and compute under autocast"
                )
        with torch.no_grad():
            self.memory = {_key(n): p.detach().clone() for n, p in self._bound.items()}
            dense = dict(self.memory)
            try:
                self.method.begin(self)
                self.apply()
                for optimizer in self.optimizers:
                    self._handles.append(optimizer.register_step_pre_hook(self._before_step))
                    self._handles.append(optimizer.register_step_post_hook(self._after_step))
            except BaseException:
                self.remove()
                for name, parameter in self._bound.items():
                    parameter.copy_(dense[_key(name)])
                raise

    def weight(self, name: str) -> Tensor:
        """theta of a tensor; where the parameter is sharded, as it is."""
        parameter, kept = self._bound[name], self.memory[_key(name)]
        if kept.device != parameter.device:
            kept = kept.to(parameter.device)
        elif is_sharded(parameter) and not is_sharded(kept):
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
            kept = distribute_tensor(kept, mesh, placements, src_data_rank=None)
        self.memory[_key(name)] = kept
        return kept

    def choose(self, pattern: Pattern | None = None) -> None:
        """Masks of the highest scores of theta.

        Args:
            pattern: None: the run's.

        Raises:
            InvalidArgument: weights that are not finite.
        """
        legal = self.pattern if pattern is None else pattern
        if legal.fixed_density is not None:
            for name, view in self.views.items():
                self._select(name, view, legal, self._scores(name, view), None)
            return
        scores = {n: self._scores(n, v) for n, v in self.views.items()}
        specs = [v.spec(legal) for v in self.views.values()]
        keep = get_budget(self.budget)(specs, self.sparsity or 0.0, scores)
        for name, view in self.views.items():
            self._select(name, view, legal, scores[name], keep[name])

    def _scores(self, name: str, view: View) -> Tensor:
        weight = whole(self.weight(name)).detach()
        return view.matrix(self.method.score(self, name, weight)).float()

    def _select(
        self, name: str, view: View, pattern: Pattern, scores: Tensor, keep: int | None
    ) -> None:
        try:
            self.masks[name] = view.select(pattern, scores, keep)
        except InvalidArgument as error:
            raise InvalidArgument(
                f"{name} after step {self.step}: {error}; a training that diverges needs a lower "
                "learning rate"
            ) from None

    def _watch(self, name: str, parameter: nn.Parameter) -> None:
        """Gradients stay dense."""

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._bind()
        given = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if given is None:
            self._enter(optimizer)
            return None

        def closure() -> Any:  # called once, or several times by optimizers that search a line
            with torch.no_grad():
                if id(optimizer) in self._inside:
                    self._take(optimizer)
                    self._show(optimizer)
            loss = given()
            with torch.no_grad():
                self._enter(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _enter(self, optimizer: Optimizer) -> None:
        """theta into the parameters; gradients get what the method adds, or its rule steps."""
        self._inside.add(id(optimizer))
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else float(scale)
        hidden = self._hidden[id(optimizer)] = []
        for name in self._optimizers.names_of(optimizer):
            parameter, kept = self._bound[name], self._looked_at(name)
            parameter.detach().copy_(kept)
            self._whole.add(name)
            gradient = parameter.grad
            if gradient is None:
                continue
            mask = local_mask(self.masks[name], parameter)
            parts = local_part(parameter.detach()), mask, local_part(gradient)
            if not self.method.has_rule:
                self.method.add(self, name, *parts, scale)
                continue
            if scale != 1.0:
                raise InvalidArgument(
                    f"method {self.method.info.name!r} steps by a rule of its own, which a fused "
                    "optimizer under a loss scaler keeps gradients from; use fused=False"
                )
            self.method.rule(self, name, *parts, optimizer.state[parameter], groups[id(parameter)])
            hidden.append((parameter, gradient))
            parameter.grad = None

    def _take(self, optimizer: Optimizer) -> None:
        """theta out of the parameters, which are about to get what layers compute with."""
        self._inside.discard(id(optimizer))
        for parameter, gradient in self._hidden.pop(id(optimizer), []):
            parameter.grad = gradient
        for name in self._optimizers.names_of(optimizer):
            self.weight(name).copy_(self._bound[name].detach())

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        inside = id(optimizer) in self._inside
        if inside:
            self._take(optimizer)
        if self._optimizers.step_is_over(optimizer):
            self.step += 1
            self.dense_steps += 1
            self.method.update(self)
            self.apply()
        elif inside:
            self._show(optimizer)

    def _show(self, optimizer: Optimizer) -> None:
        for name in self._optimizers.names_of(optimizer):
            self._zero(name)

    def _looked_at(self, name: str) -> Tensor:
        """theta, with what was written into the parameter since W was put there."""
        kept, parameter = self.weight(name), self._bound[name].detach()
        if parameter._version != self._shown.get(name, parameter._version):
            used = kept.clone()
            self._use(name, used)
            mine, now = local_part(kept), local_part(parameter)
            mine.copy_(torch.where(now == local_part(used), mine, now))
        return kept

    def _use(self, name: str, weight: Tensor) -> None:
        mask = local_mask(self.masks[name], weight)
        if self._hard:
            keep_only(mask, local_part(weight))
        else:
            self.method.used(self, name, local_part(weight), mask)

    def _zero(self, name: str) -> None:
        """What the layer computes with, into its parameter."""
        parameter = self._bound[name].detach()
        if name not in self._whole:
            parameter.copy_(self.weight(name))
        self._whole.discard(name)
        self._use(name, parameter)
        self._shown[name] = parameter._version

    def finish(self) -> Masks:
        """End the run: the layers have theta * M, hooks are gone, the mask record is on the model.

        Returns:
            The masks of this run.
        """
        if not self.finished:
            with torch.no_grad():
                for name in self._bound:
                    self._looked_at(name)
            self._hard = True
        return super().finish()

    def remove(self) -> None:
        if not self.finished:
            self.method.leave(self)
        super().remove()


def _key(name: str) -> str:
    return f"weight/{name}"
