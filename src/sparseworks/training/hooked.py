"""`sparseworks.sparsify`: sparse training beside any loop, through two kinds of hooks.

Gradients are masked as they are accumulated, so that clipping and scalers see what counts; all
else happens after the optimizer's step: masked weights and their optimizer state are set to exactly
0 (weight decay and momentum cannot move them), then the method may change the masks. Nothing runs
before the step, because some trainers step before backward.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import MaskEntry, Masks, attach, masks
from sparseworks.core.patterns import Pattern, check_sparsity, parse_pattern
from sparseworks.core.registry import MethodInfo
from sparseworks.models.views import View, find_prunable

__all__ = ["Hooked", "Run", "sparsify", "unwrapped"]

_FLATTENING = (
    "FP16_Optimizer", "DistributedFusedAdam", "DistributedFusedLAMB", "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer", "ZeroRedundancyOptimizer",
)  # fmt: skip
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


class Hooked(ABC):
    """Base of methods that change masks while a model trains; frozen dataclasses of options."""

    info: ClassVar[MethodInfo]
    starts_from_record: ClassVar[bool] = False
    pattern: ClassVar[str] = "unstructured"
    budget: ClassVar[str] = "uniform"

    def begin(self, run: Run) -> None:  # noqa: B027
        """Choose the first masks, `run.masks[name]`; all weights are kept before this."""

    def wants_dense_gradients(self, run: Run) -> bool:
        """Must the next step's gradients also be kept for masked weights?"""
        return False

    def update(self, run: Run) -> None:  # noqa: B027
        """Called after every optimizer step, `run.step` counted from 1."""


class Run:
    """One sparse training run; made by `sparsify`.

    Attributes:
        step: optimizer steps taken.
        masks: parameter name -> bool mask on the parameter's device.
        views: parameter name -> its matrix view.
        dense_gradients: of the last step, where the method asked for them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Hooked,
        views: Iterable[View],
        *,
        sparsity: float | None,
        steps: int | None,
        pattern: Pattern,
        budget: Any,
        seed: int,
    ) -> None:
        self.model, self.optimizer, self.method = model, optimizer, method
        self.views = {v.name: v for v in views}
        self.sparsity, self.steps, self.pattern, self.budget = sparsity, steps, pattern, budget
        self.seed = seed
        self.step = 0
        self.masks: dict[str, Tensor] = {
            n: torch.ones_like(v.parameter, dtype=torch.bool) for n, v in self.views.items()
        }
        self.dense_gradients: dict[str, Tensor] = {}
        self.finished = False
        self._bound: dict[str, nn.Parameter] = {}
        self._handles: list[Any] = []

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that are masked, by name, as the optimizer holds them now."""
        return self._bound

    @property
    def current_sparsity(self) -> float:
        """Fraction of masked weights right now."""
        kept = sum(int(m.sum()) for m in self.masks.values())
        return 1.0 - kept / max(1, sum(m.numel() for m in self.masks.values()))

    def start(self) -> None:
        """Bind the parameters, choose the first masks, and hook in."""
        self._bind()
        self.method.begin(self)
        self.apply()
        self._handles.append(self.optimizer.register_step_post_hook(self._after_step))

    def _bind(self) -> None:
        """Find the parameters by name (wrappers replace the objects) and hook their gradients."""
        named = {_plain(n): p for n, p in self.model.named_parameters(remove_duplicate=False)}
        for name in self.views:
            parameter = named[name]
            if self._bound.get(name) is parameter:
                continue
            self._bound[name] = parameter
            if parameter.requires_grad:
                hook = self._gradient_hook(name)
                add = parameter.register_post_accumulate_grad_hook
                self._handles.append(add(hook))  # type: ignore[no-untyped-call]

    def _gradient_hook(self, name: str) -> Any:
        def mask_gradient(parameter: Tensor) -> None:
            if parameter.grad is None or self.finished:
                return
            mask = self.masks[name]
            if self.method.wants_dense_gradients(self):
                self._keep_dense(name, parameter.grad.detach(), mask)
            parameter.grad.masked_fill_(~mask, 0.0)

        return mask_gradient

    def _keep_dense(self, name: str, gradient: Tensor, mask: Tensor) -> None:
        """The dense gradient over accumulated batches: only its kept part survives in `.grad`."""
        before = self.dense_gradients.get(name)
        dense = gradient.clone()
        if before is not None:
            dense += before.masked_fill(mask, 0.0)
        self.dense_gradients[name] = dense

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._bind()
        self.step += 1
        self.apply()
        self.method.update(self)
        self.dense_gradients.clear()

    @torch.no_grad()
    def apply(self) -> None:
        """Set masked weights and their per-element optimizer state to exactly 0."""
        for name, parameter in self._bound.items():
            dropped = ~self.masks[name]
            parameter.masked_fill_(dropped, 0.0)
            for value in self.optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(dropped, 0.0)

    @torch.no_grad()
    def set_mask(self, name: str, mask: Tensor) -> None:
        """A new mask; weights that were masked start at 0 with fresh optimizer state."""
        self.masks[name] = mask
        parameter = self._bound[name]
        parameter.masked_fill_(~mask, 0.0)
        for value in self.optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.masked_fill_(~mask, 0.0)

    def record(self) -> Masks:
        """The masks as they are now."""
        entries = {n: MaskEntry.of(m.cpu(), str(self.pattern)) for n, m in self.masks.items()}
        return Masks(entries, self.method.info.name)

    def finish(self) -> Masks:
        """End the run: zeros exact, hooks gone, the mask record on the model.

        Returns:
            The record.
        """
        if not self.finished:
            self.apply()
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self.finished = True
            attach(unwrapped(self.model), self.record())
        return self.record()

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the model's and the optimizer's own state."""
        return {
            "method": self.method.info.name,
            "options": asdict(self.method) if is_dataclass(self.method) else {},
            "step": self.step,
            "masks": self.record().state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, bit for bit.

        Raises:
            InvalidArgument: the state is of another method or of other tensors.
        """
        mine: dict[str, Any] = asdict(self.method) if is_dataclass(self.method) else {}
        if state["method"] != self.method.info.name or state["options"] != mine:
            raise InvalidArgument(
                f"the state is of method {state['method']!r} with {state['options']}, this run is "
                f"{self.method.info.name!r} with {mine}"
            )
        record = Masks.from_state_dict(state["masks"])
        if set(record) != set(self.masks):
            odd = sorted(set(record) ^ set(self.masks))[0]
            raise InvalidArgument(f"the state and this run do not mask the same tensors: {odd!r}")
        self.step = int(state["step"])
        for name, mask in record.items():
            self.masks[name] = mask.to(self._bound[name].device)
        self.apply()


def sparsify(
    model: nn.Module,
    optimizer: Optimizer,
    method: str | Hooked,
    *,
    sparsity: float | None = None,
    steps: int | None = None,
    pattern: str | Pattern | None = None,
    budget: Any = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> Run:
    """Make a training loop sparse; call the loop as before, then `run.finish()`.

    Args:
        model: the model that trains; wrappers may be put round it afterwards.
        optimizer: any torch optimizer that holds the model's parameters one by one.
        method: "fixed" (the zeros of the model's mask record stay zero) or a registered method.
        sparsity: final fraction of zeros, for methods that choose masks.
        steps: optimizer steps of the whole training, for methods with a schedule.
        pattern: legal zeros; None: the method's own.
        budget: who pays; None: the method's own.
        include: name patterns of the only weights to mask.
        exclude: name patterns of weights to leave dense.
        seed: of the run's private random numbers.
        options: fields of the method.

    Raises:
        InvalidArgument: an option or an optimizer that cannot be used; nothing was changed.
        ModelError: "fixed" on a model without masks.
    """
    chosen = registry.build(method, **options)
    if not isinstance(chosen, Hooked):
        kind = getattr(getattr(chosen, "info", None), "kind", type(chosen).__name__)
        raise InvalidArgument(f"method {method!r} is {kind}, not one for a training loop")
    if type(optimizer).__name__ in _FLATTENING:
        raise InvalidArgument(
            f"{type(optimizer).__name__} keeps flattened copies of the weights, in which masks "
            "cannot be enforced; use an optimizer that steps the parameters themselves"
        )
    if chosen.starts_from_record:
        record = masks(unwrapped(model))
        if record is None or not len(record):
            raise ModelError(
                f"method {chosen.info.name!r} needs a model with masks: prune or load one first"
            )
        views = [v for v in find_prunable(model, include="*") if _plain(v.name) in record]
    else:
        views = list(find_prunable(model, include, exclude))
        if sparsity is None:
            raise InvalidArgument(f"method {chosen.info.name!r} needs `sparsity`")
        check_sparsity(sparsity)
    legal = parse_pattern(chosen.pattern if pattern is None else pattern)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lacking = [v.name for v in views if v.parameter.requires_grad and id(v.parameter) not in held]
    if lacking:
        raise InvalidArgument(
            f"the optimizer does not hold {lacking[0]!r}; build it from this model's parameters, "
            "or exclude the tensor"
        )
    plain = [View(_plain(v.name), v.module, v.attribute, v.layout, v.groups) for v in views]
    run = Run(
        model,
        optimizer,
        chosen,
        plain,
        sparsity=sparsity,
        steps=steps,
        pattern=legal,
        budget=chosen.budget if budget is None else budget,
        seed=seed,
    )
    run.start()
    return run


def _plain(name: str) -> str:
    """A parameter's name without the prefixes of DDP, torch.compile and FSDP."""
    for prefix in _WRAPPERS:
        name = name.replace(prefix, "", 1) if name.startswith(prefix) else name
    return name.replace("._orig_mod.", ".").replace("._fsdp_wrapped_module.", ".")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile wrappers."""
    while True:
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner
