"""EcoDiff: learned gates on a frozen diffusion model, judged by the end of the sampling chain.

Every group g (a head, a hidden unit) has a logit l_g and a hard concrete gate, drawn anew in every
step of the chain,

    s = sigmoid((ln(u + e) - ln(1 - u + e) + l) / b),   z = clamp(1.2 s - 0.1, 0, 1),   u ~ U(0, 1),

multiplied into the activations; e limits the noise to +- ln((1 + e) / e). With x_T(z) the end of
the chain from the same noise and prompt,

    loss = ||x_T(z) - x_T(1)||^2 / size + r sum over kinds of mean over layers of ||l||_1 / groups,

the kinds being heads and hidden units. Only the logits learn, by AdamW with its usual decay. The
chain is run without gradient, keeping its T states; then step by step from the end, each is
repeated with gradient and its vector-Jacobian product handed on, so memory does not grow with T.
The gates of a step are functions of a stored key, so the repeated step is the same step (released
code draws again). Heads and hidden units are ranked apart by their logits, and as large a share of
both is cut.

Source: Zhang, Jin, Dong, Khakzar, Torr, Stegmaier, Kawaguchi 2024, Effortless Efficiency: Low-Cost
Pruning of Diffusion Models. Gate: Louizos, Welling, Kingma 2018, Learning Sparse Neural Networks
through L0 Regularization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Arguments, Batch, Loss
from sparseworks.models.coupling import Coupling
from sparseworks.models.modes import evaluating
from sparseworks.weights.structured.applying import free_families
from sparseworks.weights.structured.base import GroupScore, Scores
from sparseworks.weights.structured.gates import Gates
from sparseworks.weights.structured.widths import entries

__all__ = ["EcoDiff", "Sampler", "chain_gradients", "hard_concrete"]

STRETCH = 0.1
Norm = Literal["l1", "sigmoid", "l0"]
Objective = Literal["final", "step"]


class Sampler(Protocol):
    """A sampling chain whose steps can be repeated: pure functions of what they are given."""

    @property
    def steps(self) -> int: ...

    def predict(self, model: nn.Module, x: Tensor, i: int, condition: Any) -> Tensor:
        """What the model says of state x in step i."""
        ...

    def advance(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        """The next state."""
        ...


def hard_concrete(
    logit: Tensor, u: Tensor, temperature: float = 0.83, noise: float = 0.5
) -> Tensor:
    """Gates in [0, 1] from logits and uniform noise of the same shape; `noise` is e."""
    s = torch.sigmoid(((u + noise).log() - (1 - u + noise).log() + logit) / temperature)
    return (s * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def chain_gradients(
    step: Callable[[Tensor, int], Tensor],
    start: Tensor,
    steps: int,
    loss: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
) -> tuple[float, list[Tensor]]:
    """Loss of the last state of x_i+1 = step(x_i, i) and its gradients, with one step in memory.

    Args:
        step: gives the same result whenever it is called with the same arguments.
        start: x_0.
        steps: T.
        loss: of x_T, a scalar.
        parameters: what the gradients are for.
    """
    states = [start]
    with torch.no_grad():
        for i in range(steps):
            states.append(step(states[-1], i))
    last = states.pop().detach().requires_grad_()
    value = loss(last)
    (ahead,) = torch.autograd.grad(value, last)
    total = [torch.zeros_like(p) for p in parameters]
    for i in reversed(range(steps)):
        x = states.pop().detach().requires_grad_()
        y = step(x, i)
        found = torch.autograd.grad(y, [x, *parameters], ahead, allow_unused=True)
        ahead = torch.zeros_like(x) if found[0] is None else found[0]
        for sum_, g in zip(total, found[1:]):
            if g is not None:
                sum_ += g
    return float(value.detach()), total


@dataclass(frozen=True)
class EcoDiff(GroupScore):
    """Scores of groups: the logits of gates trained on the end of the sampling chain.

    `data` of `slim` are (noise, condition) pairs, each one chain.

    Args:
        sampler: the chain; needed.
        epochs: passes over the chains.
        lr: of AdamW on the logits; rises linearly over `warmup` steps.
        regularisation: r, of the penalty.
        penalty: "l1": ||l||_1; "sigmoid": ||sigmoid(0.4 l + 1)||_1, which does not stop at 0; "l0":
            sum sigmoid(l - b ln(1/11)), the expected number of gates that are not 0.
        start: first logit.
        temperature: b.
        noise: e, above 0; the smaller, the more the gates vary. The paper's: 0.5 for SDXL, 0.1 for
            FLUX.
        decay: of AdamW.
        accumulate: chains per step; their gradients add up.
        warmup: steps over which the rate rises.
        separate: rank heads and hidden units apart; False: one ranking of all logits.
        objective: "final": the end of the chain; "step": each prediction by itself, from the
            states of the dense chain (a comparison, one gradient step costs as much).
        seed: of the gates.
    """

    sampler: Sampler | None = None
    epochs: int = 4
    lr: float = 0.1
    regularisation: float = 0.5
    penalty: Norm = "l1"
    start: float = 3.0
    temperature: float = 0.83
    noise: float = 0.5
    decay: float = 0.01
    accumulate: int = 4
    warmup: int = 0
    separate: bool = True
    objective: Objective = "final"
    seed: int = 0

    info: ClassVar[MethodInfo] = MethodInfo(
        name="ecodiff",
        title="Effortless Efficiency: Low-Cost Pruning of Diffusion Models",
        authors="Zhang et al.",
        year=2024,
        room="weights/structured",
        kind="structured",
        card="159",
        needs=("data",),
        pattern="coupled groups",
        budget="flops, params or latency",
        cost="a few hundred sampling chains, twice forward and once backward",
        summary="train gates so that the end of a diffusion model's sampling stays, then cut",
        command="sparseworks slim MODEL --data FILE.py:CHAINS --method ecodiff "
        "--option sampler=FILE.py:SAMPLER --flops 0.5 --out OUT",
    )
    normalise: ClassVar[bool | None] = None
    calibrates: ClassVar[bool] = False

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        """The trained logits or their ranks within a kind, `[groups]`; +inf without a gate.

        Raises:
            InvalidArgument: there is no sampler, or an option is out of range.
            DataError: there are no chains, or the loss is not finite.
        """
        if self.sampler is None or self.sampler.steps < 1:
            raise InvalidArgument("ecodiff needs sampler=, a chain of at least one step")
        positive = min(self.lr, self.temperature, self.noise)
        if min(self.epochs, self.accumulate) < 1 or positive <= 0:
            raise InvalidArgument("epochs=, accumulate= from 1; lr=, temperature=, noise= above 0")
        if self.penalty not in get_args(Norm) or self.objective not in get_args(Objective):
            raise InvalidArgument(
                f"ecodiff: penalty={self.penalty!r} is one of {get_args(Norm)}, "
                f"objective={self.objective!r} one of {get_args(Objective)}"
            )
        chains = list(data) if data is not None else []
        if not chains:
            raise DataError("ecodiff needs chains: data=[(noise, condition), ...]")
        families = free_families(coupling)
        gates = Gates(model, coupling, families)
        heads = [entries(coupling, f) > 1 for f in families]
        kinds = [[i for i, h in enumerate(heads) if h == kind] for kind in sorted(set(heads))]
        logits = [torch.full_like(v, self.start).requires_grad_() for v in gates.values]
        wanted = {p: p.requires_grad for p in model.parameters()}
        model.requires_grad_(False)
        try:
            with evaluating(model):
                self._train(model, gates, logits, chains, kinds)
        finally:
            for p, was in wanted.items():
                p.requires_grad_(was)
        scores = np.full(coupling.count, np.inf)
        for kind in kinds:
            values = torch.cat([logits[i].detach().double().cpu() for i in kind])
            if self.separate:
                values = values.argsort(stable=True).argsort().double() / len(values)
            for i, part in zip(kind, torch.split(values, [len(families[i]) for i in kind])):
                scores[families[i].roots] = part.numpy()
        return scores

    def example(self, model: nn.Module, data: Iterable[Batch]) -> Arguments:
        """What the sampler calls the model with in the first step of the first chain."""
        if self.sampler is None:
            raise InvalidArgument("ecodiff needs sampler=, a chain of at least one step")
        seen: list[Arguments] = []
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(Arguments(args, kwargs)), with_kwargs=True
        )
        chain: Any = next(iter(data))
        noise, condition = chain
        try:
            with evaluating(model), torch.no_grad():
                self.sampler.predict(model, noise, 0, condition)
        finally:
            handle.remove()
        return seen[0]

    def _train(
        self, model: nn.Module, gates: Gates, logits: list[Tensor], chains: list[Any],
        kinds: list[list[int]],
    ) -> None:  # fmt: skip
        optimizer = torch.optim.AdamW(logits, self.lr, weight_decay=self.decay)
        dense = [self._dense(model, *chain) for chain in chains]
        order = generator_for(self.seed, "chains")
        done = 0
        with gates:
            for _ in range(self.epochs):
                picks = torch.randperm(len(chains), generator=order).tolist()
                for first in range(0, len(picks), self.accumulate):
                    some = picks[first : first + self.accumulate]
                    total = [torch.zeros_like(p) for p in logits]
                    for i in some:
                        draw = self._draw(gates, logits, f"{done}/{i}")
                        value, found = self._gradients(model, draw, logits, chains[i], dense[i])
                        if not math.isfinite(value):
                            raise DataError(f"the chain's loss is {value}; lower lr=")
                        for sum_, g in zip(total, found):
                            sum_ += g
                    push = torch.autograd.grad(self._penalty(logits, kinds), logits)
                    for p, g, r in zip(logits, total, push):
                        p.grad = g + r
                    rise = min(1.0, (done + 1) / max(1, self.warmup))
                    optimizer.param_groups[0]["lr"] = self.lr * rise
                    optimizer.step()
                    done += 1

    @torch.no_grad()
    def _dense(self, model: nn.Module, x: Tensor, condition: Any) -> list[tuple[Tensor, Tensor]]:
        """(state, prediction) of the chain without gates; for "final" of its last step only."""
        sampler = self.sampler
        assert sampler is not None
        found = []
        for i in range(sampler.steps):
            e = sampler.predict(model, x, i, condition)
            if self.objective == "step" or i == sampler.steps - 1:
                found.append((x, e))
            x = sampler.advance(x, e, i)
        return found

    def _draw(self, gates: Gates, logits: list[Tensor], key: str) -> Callable[[int], None]:
        """Sets the gates of step i, always the same ones for a key."""

        def draw(i: int) -> None:
            g = generator_for(self.seed, key, i)
            for k, logit in enumerate(logits):
                u = torch.rand(logit.shape, generator=g).to(logit)
                gates.values[k] = hard_concrete(logit, u, self.temperature, self.noise)

        return draw

    def _gradients(
        self, model: nn.Module, draw: Callable[[int], None], logits: list[Tensor], chain: Any,
        dense: list[tuple[Tensor, Tensor]],
    ) -> tuple[float, list[Tensor]]:  # fmt: skip
        sampler, (noise, condition) = self.sampler, chain
        assert sampler is not None

        def step(x: Tensor, i: int) -> Tensor:
            draw(i)
            return sampler.advance(x, sampler.predict(model, x, i, condition), i)

        if self.objective == "final":
            end = sampler.advance(*dense[-1], sampler.steps - 1)
            return chain_gradients(step, noise, sampler.steps, lambda x: F.mse_loss(x, end), logits)
        value, total = 0.0, [torch.zeros_like(p) for p in logits]
        for i, (x, expected) in enumerate(dense):
            draw(i)
            error = F.mse_loss(sampler.predict(model, x, i, condition), expected) / sampler.steps
            for sum_, g in zip(total, torch.autograd.grad(error, logits)):
                sum_ += g
            value += float(error.detach())
        return value, total

    def _penalty(self, logits: list[Tensor], kinds: list[list[int]]) -> Tensor:
        if self.penalty == "l1":
            parts = [p.abs().mean() for p in logits]
        elif self.penalty == "sigmoid":
            parts = [torch.sigmoid(0.4 * p + 1).mean() for p in logits]
        else:
            shift = self.temperature * math.log(STRETCH / (1 + STRETCH))
            parts = [torch.sigmoid(p - shift).mean() for p in logits]
        means = [torch.stack([parts[i] for i in kind]).mean() for kind in kinds]
        return self.regularisation * torch.stack(means).sum()
