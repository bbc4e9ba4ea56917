"""`sparseworks.upcycle`: put mixtures of experts in the place of a model's MLPs.

run = sw.upcycle(model, experts=8, top_k=2)
optimizer = torch.optim.AdamW(model.parameters())
run.attach(optimizer)
...                            # the usual loop, with loss + run.penalty()
run.finish()
run.to_transformers().save_pretrained(folder)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import masks
from sparseworks.core.random import generator_for
from sparseworks.core.registry import build, options_of
from sparseworks.experts.exporting import as_transformers
from sparseworks.experts.layers import MoE, mixtures
from sparseworks.experts.load import Load
from sparseworks.experts.method import MixtureMethod
from sparseworks.experts.mlps import find_mlps

__all__ = ["Mixture", "upcycle"]


class Mixture:
    """A model with mixtures on its way through training; made by `upcycle`.

    Attributes:
        model: changed in place.
        method, options: by which it was made.
        layers: the mixtures by the names of the MLPs that they replaced.
        step: optimizer steps taken.
        steps: of the whole training, where they were told.
        own: numbers that the method keeps.
        frozen: parameters that do not train until `finish`.
    """

    def __init__(
        self, model: nn.Module, method: MixtureMethod, layers: Mapping[str, MoE], steps: int | None
    ) -> None:
        self.model, self._method, self.layers, self.steps = model, method, dict(layers), steps
        self.step, self.finished = 0, False
        self.own: dict[str, Any] = {}
        self.frozen: list[nn.Parameter] = []
        self._handle: Any = None

    @property
    def method(self) -> str:
        return self._method.info.name

    @property
    def options(self) -> dict[str, Any]:
        return options_of(self._method)

    @property
    def progress(self) -> float:
        """step / steps, at most 1.

        Raises:
            InvalidArgument: the call was not told the number of steps.
        """
        if self.steps is None:
            raise InvalidArgument(
                f"method {self.method!r} follows a schedule: give `steps`, the number of optimizer "
                "steps of the whole training"
            )
        return min(1.0, self.step / self.steps)

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """They do not train until `finish`."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self.frozen.append(parameter)

    def attach(self, optimizer: Optimizer) -> Mixture:
        """Follow an optimizer: after each of its steps the method's schedule goes on.

        Raises:
            InvalidArgument: attached before, or the optimizer lacks a parameter of the mixtures.
        """
        if self._handle is not None or self.finished:
            state = "finished" if self.finished else "already attached to an optimizer"
            raise InvalidArgument(f"this mixture is {state}")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            for inner, p in layer.named_parameters():
                if p.requires_grad and id(p) not in held:
                    raise InvalidArgument(
                        f"the optimizer does not hold {name}.{inner}; build it after `upcycle`"
                    )
        self._handle = optimizer.register_step_post_hook(lambda *_: self.advance())
        return self

    @torch.no_grad()
    def advance(self) -> None:
        """One optimizer step is done; `attach` calls it by itself."""
        self.step += 1
        self._method.update(self)

    def penalty(self) -> Tensor:
        """What the last forward pass adds to the loss; 0 where the method has no loss."""
        found = None if self.finished else self._method.penalty(self)
        if found is not None:
            return found
        return torch.zeros((), device=next(self.model.parameters()).device)

    def load(self) -> dict[str, Load]:
        """How tokens were spread since `reset`, by layer."""
        return {name: layer.load for name, layer in self.layers.items()}

    def reset(self) -> None:
        """Count from the start."""
        for layer in self.layers.values():
            layer.load.reset()

    @property
    def density(self) -> float:
        """Experts that a token used, of all there are, since `reset`."""
        loads = list(self.load().values())
        return sum(x.active / x.experts for x in loads) / max(1, len(loads))

    def finish(self) -> nn.Module:
        """End of training: what the method froze or softened is undone; returns the model."""
        if not self.finished:
            self._method.finish(self)
            for parameter in self.frozen:
                parameter.requires_grad_(True)
            if self._handle is not None:
                self._handle.remove()
            self.finished = True
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the model's and the optimizer's state."""
        return {"method": self.method, "step": self.step, "own": dict(self.own)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            InvalidArgument: the state is of another method.
        """
        if state["method"] != self.method:
            raise InvalidArgument(f"the state is of {state['method']!r}, not of {self.method!r}")
        self.step, self.own = state["step"], dict(state["own"])
        self._method.restore(self)

    def to_transformers(self) -> Any:
        """A model of the class that transformers has for it, with its own copy of the weights.

        Raises:
            ModelError: no class of transformers computes this function.
        """
        return as_transformers(self.model, self.layers)

    def __str__(self) -> str:
        width = max((len(n) for n in self.layers), default=0)
        lines = [f"{self.method}: {len(self.layers)} mixtures"]
        for name, layer in self.layers.items():
            seen = layer.load
            told = f"  {name:<{width}}  {layer.experts.extra_repr()}"
            if seen.tokens:
                told += f", {seen.active:.2f} active, load {seen.imbalance:.2f}x of even"
            lines.append(told)
        return "\n".join(lines)


def upcycle(
    model: nn.Module,
    method: str | MixtureMethod = "upcycling",
    *,
    steps: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> Mixture:
    """Turn the MLPs of a dense model into mixtures of experts, in place.

    With the default method the model computes the same function as before, and is then trained on
    with more parameters at the cost of `top_k` MLPs for a token.

    Args:
        model: with MLPs (gate_proj, up_proj and down_proj, or two linear layers).
        method: a registered method of kind "mixture", or an object.
        steps: optimizer steps of the whole training, for methods with a schedule.
        include, exclude: name patterns of MLPs.
        seed: of routers and of what is drawn at random.
        **options: of the method (experts=8, top_k=2).

    Raises:
        InvalidArgument: options that do not fit; the model is as it was.
        ModelError: no MLP, masked or non-finite weights, or mixtures already; it is as it was.
    """
    made: MixtureMethod = build(method, ("mixture",), **options)
    if steps is not None and steps < 1:
        raise InvalidArgument(f"steps={steps} must be at least 1")
    there = next((name for name, _ in mixtures(model)), None)
    if there is not None:
        raise ModelError(f"{there} is a mixture already; upcycle the dense model")
    if masks(model) is not None:
        raise ModelError(
            "the model has a mask record, which does not carry over to experts; upcycle first"
        )
    mlps = made.taken(find_mlps(model, include, exclude))
    layers: dict[str, MoE] = {}
    for mlp in mlps:
        layers[mlp.name] = made.layer(mlp, generator_for(seed, mlp.name))
        layers[mlp.name].train(mlp.module.training)
    run = Mixture(model, made, layers, steps)
    try:
        _place(model, layers)
        made.begin(run)
    except BaseException:
        made.undo(run)
        _place(model, {m.name: m.module for m in mlps})
        for parameter in run.frozen:
            parameter.requires_grad_(True)
        raise
    return run


def _place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        owner: Any = model.get_submodule(parent)
        owner._modules[child] = module
