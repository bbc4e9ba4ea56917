"""`sparseworks.sparsify`: sparse training beside any loop, through two kinds of hooks.

Gradients are masked as they are accumulated, so that clipping and scalers see what counts; all
else happens after the optimizer's step: masked weights and their optimizer state are set to exactly
0 (weight decay and momentum cannot move them), then the method may change the masks. Nothing runs
before the step, because some trainers step before backward. (Methods whose masked weights train too
are `straight_through`.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparseworks.core.masks import Masks
from sparseworks.core.patterns import Pattern
from sparseworks.core.types import dense_lines
from sparseworks.kernels.zeroing import keep_only
from sparseworks.models.views import View
from sparseworks.training.attaching import attach_beside, put_masks
from sparseworks.training.method import Hooked, Periodic
from sparseworks.training.names import plain_name, unwrapped
from sparseworks.training.optimizers import Optimizers
from sparseworks.training.resuming import resume_run, state_of_run
from sparseworks.training.sharding import local_mask, local_part

__all__ = ["Hooked", "Periodic", "Run"]


class Run:
    """One sparse training run; made by `sparsify`.

    Attributes:
        step: steps taken; of several optimizers, those in which each has stepped.
        every: steps between mask updates, of methods that have such an option; else 0.
        masks: parameter name -> bool mask on the parameter's device.
        views: parameter name -> its matrix view.
        skipped: parameter name -> why it is left as it is.
        dense_gradients: of the last step, where the method asked for them.
        dense_steps: steps whose gradients were computed for masked weights too.
        memory: tensors that the method keeps from step to step; part of the saved state.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        method: Hooked,
        views: Iterable[View],
        *,
        sparsity: float | None,
        steps: int | None,
        pattern: Pattern,
        budget: Any,
        seed: int,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.method, self.skipped = model, method, dict(skipped or {})
        self.views = {v.name: v for v in views}
        self.sparsity, self.steps, self.pattern, self.budget = sparsity, steps, pattern, budget
        self.seed = seed
        self.step = 0
        self.every = method.interval(steps) if isinstance(method, Periodic) else 0
        self.masks: dict[str, Tensor] = {
            n: torch.ones(v.parameter.shape, dtype=torch.bool, device=v.parameter.device)
            for n, v in self.views.items()
        }
        self.dense_gradients: dict[str, Tensor] = {}
        self.dense_steps = 0
        self.memory: dict[str, Tensor] = {}
        self.finished = False
        self._optimizers = optimizers
        self._arriving: dict[str, Tensor] = {}  # dense gradients whose optimizer has yet to step
        self._bound: dict[str, nn.Parameter] = {}
        self._places: dict[str, tuple[Mapping[str, Any], str]] = {}  # a module's parameters, key
        self._overwritten: list[tuple[Tensor, int, Tensor]] = []
        self._handles: list[Any] = []

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Those that the run follows, out of their wrappers."""
        return self._optimizers.all

    @property
    def optimizer(self) -> Optimizer:
        """The first of them, for most trainings the only one."""
        return self.optimizers[0]

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that are masked, by name, as the optimizer holds them now."""
        return self._bound

    @property
    def current_sparsity(self) -> float:
        """Fraction of masked weights right now."""
        kept = sum(int(m.sum()) for m in self.masks.values())
        return 1.0 - kept / max(1, sum(m.numel() for m in self.masks.values()))

    @torch.no_grad()
    def start(self) -> None:
        """Bind the parameters, choose the first masks, and hook in."""
        before: list[tuple[str, Tensor, Tensor]] = []
        try:
            self._bind()
            parts = ((n, local_part(t)) for n in self._bound for t in self._tensors(n))
            before += [(name, tensor, tensor.clone()) for name, tensor in parts]
            self.method.begin(self)
            self.apply()
            for optimizer in self.optimizers:
                self._handles.append(optimizer.register_step_post_hook(self._after_step))
        except BaseException:
            self.remove()
            for _, tensor, old in before:
                tensor.copy_(old)
            raise
        # weights that were loaded before the run, whose masks come with `load_state_dict`
        for name, tensor, old in before:
            if not bool(self.masks[name].all()):
                self._overwritten.append((tensor, tensor._version, old))

    def _bind(self) -> None:
        """Find the parameters by name (wrappers replace the objects) and hook their gradients."""
        if self._bound and all(p is self._found(n) for n, p in self._bound.items()):
            return
        self._places = {
            plain_name(f"{path}.{leaf}" if path else leaf): (module._parameters, leaf)
            for path, module in self.model.named_modules(remove_duplicate=False)
            for leaf, parameter in module._parameters.items()
            if parameter is not None
        }
        for name in self.views:
            parameter: nn.Parameter = self._found(name)
            if self._bound.get(name) is parameter:
                continue
            self._bound[name] = parameter
            if parameter.requires_grad:
                self._watch(name, parameter)
        self._optimizers.bind(self._bound)

    def _watch(self, name: str, parameter: nn.Parameter) -> None:
        """Mask the gradients of a parameter as they arrive."""
        before, after = self._fresh_hook(name), self._gradient_hook(name)
        add = parameter.register_post_accumulate_grad_hook
        self._handles.append(parameter.register_hook(before))  # type: ignore[no-untyped-call]
        self._handles.append(add(after))  # type: ignore[no-untyped-call]

    def _found(self, name: str) -> Any:
        held, leaf = self._places[name]
        return held.get(leaf)

    def _fresh_hook(self, name: str) -> Any:
        """Forget a dense gradient whose step never came (a scaler skips steps that overflow)."""

        def forget(gradient: Tensor) -> None:
            if name in self._arriving:
                grad = self._bound[name].grad
                if grad is None or not bool(local_part(grad).any()):
                    del self._arriving[name]

        return forget

    def _gradient_hook(self, name: str) -> Any:
        def mask_gradient(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None or self.finished:
                return
            self._overwritten.clear()
            mask = local_mask(self.masks[name], parameter)
            if self.method.wants_dense_gradients(self):
                self._keep_dense(name, gradient.detach(), mask)
            keep_only(mask, local_part(gradient))

        return mask_gradient

    def _keep_dense(self, name: str, gradient: Tensor, mask: Tensor) -> None:
        """The dense gradient over accumulated batches: only its kept part survives in `.grad`."""
        before = self._arriving.get(name)
        dense = gradient.clone()
        if before is not None:
            local_part(dense).add_(local_part(before).masked_fill(mask, 0.0))
        self._arriving[name] = dense

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._bind()
        for name in self._optimizers.names_of(optimizer):
            self._zero(name)
            if name in self._arriving:
                self.dense_gradients[name] = self._arriving.pop(name)
        if not self._optimizers.step_is_over(optimizer):
            return
        self.step += 1
        self.dense_steps += bool(self.dense_gradients)
        self.method.update(self)
        self.dense_gradients.clear()

    @torch.no_grad()
    def apply(self) -> None:
        """Set masked weights and their per-element optimizer state to exactly 0."""
        for name in self._bound:
            self._zero(name)

    @torch.no_grad()
    def set_mask(self, name: str, mask: Tensor) -> None:
        """A new mask; weights that were masked start at 0 with fresh optimizer state."""
        self.masks[name] = mask
        self._zero(name)

    def _tensors(self, name: str) -> list[Tensor]:
        """A parameter and what its optimizer keeps for each of its elements."""
        return [self._bound[name], *self._optimizers.state_of(self._bound[name])]

    def _zero(self, name: str) -> None:
        mask = local_mask(self.masks[name], self._bound[name])
        keep_only(mask, *map(local_part, self._tensors(name)))

    def record(self) -> Masks:
        """The masks as they are now."""
        return Masks.of(self.masks, self.method.info.name, str(self.pattern))

    def finish(self) -> Masks:
        """End the run: zeros exact, hooks gone, the mask record on the model.

        Masks that the model had of other tensors stay in its record where their zeros still hold.
        Warns where the training ended before its schedule and the sparsity is not reached.

        Returns:
            The masks of this run.
        """
        if not self.finished:
            self._warn_if_short()
            self.apply()
            self.remove()
            attach_beside(unwrapped(self.model), self.record())
        return self.record()

    def remove(self) -> None:
        """Let go of model and optimizers, which stay as they are now; no record is attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.finished = True

    def apply_to(self, model: nn.Module) -> Masks:
        """The masks as they are now on a copy of the model, an average of its weights say: exact
        zeros, and the record on the model inside its wrappers. The run goes on as before.

        Args:
            model: of the same parameters as the model of the run, in names and shapes; wrappers
                (`AveragedModel`, DDP, `torch.compile`) may be round either.

        Returns:
            The masks of this run.

        Raises:
            ModelError: another model; nothing was changed.
        """
        put_masks(self.masks, self.model, model)
        attach_beside(unwrapped(model), self.record())
        return self.record()

    def _warn_if_short(self) -> None:
        early = bool(self.sparsity and self.steps and self.step < self.steps)
        reached = self.current_sparsity
        if early and reached < (self.sparsity or 0.0) - 0.01:
            warnings.warn(
                f"the training stopped at step {self.step} of {self.steps}: the sparsity is "
                f"{reached:.1%}, not {self.sparsity:.1%}; give `steps` as many as you take, or "
                "an earlier `end`",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the model's and the optimizer's own state."""
        return {**state_of_run(self), "stepped": sorted(self._optimizers.stepped)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, bit for bit.

        Model and optimizer may have been loaded before or after `sparsify`, but before this.

        Raises:
            InvalidArgument: the state is of another method or of other tensors.
        """
        resume_run(self, state)
        for tensor, version, old in self._overwritten:
            if tensor._version == version:  # nobody has loaded anything since
                tensor.copy_(old)
        self._overwritten.clear()
        self._optimizers.stepped = set(state.get("stepped", ()))
        self._arriving.clear()
        self.apply()

    def __str__(self) -> str:
        name, many, sparsity = self.method.info.name, len(self.masks), self.current_sparsity
        at = f"step {self.step}" + ("" if self.steps is None else f" of {self.steps}")
        told = f"{name}: sparsity {sparsity:.4f} over {many} tensors at {at}"
        return "\n".join([told, *dense_lines(self.skipped, "left as it is")])
