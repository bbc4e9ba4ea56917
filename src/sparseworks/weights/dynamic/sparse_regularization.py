"""Sparse, then prune (Prasetyo et al. 2023, Sparse then Prune: Toward Efficient Vision
Transformers).

Fine-tune with a penalty on the attention probabilities A = softmax(Q K^T / sqrt(d)),

    loss + strength * R,    R = mean over batch, heads, queries, keys of log(1 + A^2),

then prune the weights once by their magnitude, all tensors together, without retraining.

The rows of A sum to 1 and log(1 + a^2) is convex on [0, 1], so R is least where attention is
uniform: it makes attention flatter, not sparser, and with N tokens it is at most ln(2) / N. The
penalties "entropy" (of the rows of A), "l1" and "log-weights" (of the weights) do what the name of
the method says.

In our quick setting (claim 023: a small ViT on digits) the paper's strength of 0.01 gains nothing
after pruning (0.0 points, -0.2 to 0.2), and from strength 0 to 100 the entropy of attention rises
by 0.17 nats instead of falling.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.registry import MethodInfo
from sparseworks.training.transforming import Transform, Transformed
from sparseworks.weights.dynamic.masks import magnitudes, select_masks

__all__ = ["AttentionProbabilities", "SparseRegularization"]

Penalty = Literal["log", "entropy", "l1", "log-weights"]
_OF_WEIGHTS = ("l1", "log-weights")


class AttentionProbabilities:
    """Forward hooks that keep the attention probabilities of the last forward pass.

    Seen are `nn.Softmax` modules, `nn.MultiheadAttention`, and modules named "...Attention..."
    that return the probabilities (Hugging Face models with `attn_implementation="eager"`).

    Args:
        model: any module.

    Attributes:
        seen: `[batch, heads, queries, keys]`, in the order of execution, with gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[Tensor] = []
        self._handles: list[Any] = []
        self._wanted: dict[nn.Module, tuple[bool, bool]] = {}
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                before = module.register_forward_pre_hook(self._ask, with_kwargs=True)
                self._handles += [before, module.register_forward_hook(self._answer)]
            elif _over_keys(module) or "Attention" in type(module).__name__:
                self._handles.append(module.register_forward_hook(self._keep))
        if self._handles:
            self._handles.append(model.register_forward_pre_hook(self._forget))

    def __bool__(self) -> bool:
        return bool(self._handles)

    def take(self) -> list[Tensor]:
        """The probabilities seen since the last call, which are then let go."""
        taken, self.seen = self.seen, []
        return taken

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.seen = []

    def _forget(self, module: nn.Module, args: Any) -> None:
        self.seen = []

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if not isinstance(value, Tensor) or value.ndim != 4 or not value.requires_grad:
                continue
            known = any(value is s for s in self.seen)  # an outer module hands it on
            if not known and (_over_keys(module) or _sums_to_one(value)):
                self.seen.append(value)

    def _ask(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        self._wanted[module] = (given["need_weights"], given["average_attn_weights"])
        given.update(need_weights=True, average_attn_weights=False)
        return (), given

    def _answer(self, module: nn.Module, args: Any, output: Any) -> tuple[Tensor, Tensor | None]:
        mixed, found = output
        need, average = self._wanted.pop(module)
        if found.requires_grad:
            self.seen.append(found if found.ndim == 4 else found[None])
        if not need:
            return mixed, None
        return mixed, found.mean(-3) if average else found


def _over_keys(module: nn.Module) -> bool:
    return isinstance(module, nn.Softmax) and module.dim in (-1, 3)


def _sums_to_one(value: Tensor) -> bool:
    total = value.detach().sum(-1)
    return bool(((total - 1).abs() < 1e-2).all())


_recorders: weakref.WeakKeyDictionary[Transformed, AttentionProbabilities]
_recorders = weakref.WeakKeyDictionary()  # jobs are compared by identity


@dataclass(frozen=True, kw_only=True)
class SparseRegularization(Transform):
    """Train with a penalty, then prune once by magnitude; add `job.penalty()` to the loss.

    Args:
        penalty_kind: "log", that of the paper; "entropy": mean over rows of -sum A log A;
            "l1": mean |w|; "log-weights": mean log(1 + w^2 / scale^2), both over the weights to
            be pruned.
        strength: lambda.
        layers: "last" (the released code) or "mean" of all attentions.
        scale: of "log-weights".
    """

    penalty_kind: Penalty = "log"
    strength: float = 0.01
    layers: Literal["last", "mean"] = "last"
    scale: float = 0.01

    budget: str | Mapping[str, float] | Budget = "global"
    info: ClassVar[MethodInfo] = MethodInfo(
        name="sparse-then-prune",
        title="Sparse then Prune: Toward Efficient Vision Transformers",
        authors="Prasetyo et al.",
        year=2023,
        card="023",
        room="weights",
        kind="transform",
        needs=("training",),
        budget="global",
        cost="the attention probabilities of a forward pass; one selection at the end",
        summary="a penalty on attention while training, then one-shot magnitude pruning",
    )

    def __post_init__(self) -> None:
        if self.penalty_kind not in get_args(Penalty) or self.layers not in ("last", "mean"):
            raise InvalidArgument(
                f"sparse-then-prune: penalty_kind={self.penalty_kind!r} must be one of "
                f"{get_args(Penalty)}, layers={self.layers!r} 'last' or 'mean'"
            )
        if not self.strength >= 0 or not self.scale > 0:
            raise InvalidArgument(
                f"sparse-then-prune: strength={self.strength} must be at least 0, "
                f"scale={self.scale} above 0"
            )

    def begin(self, job: Transformed) -> None:
        if self.penalty_kind in _OF_WEIGHTS or self.strength == 0:
            return
        recorder = AttentionProbabilities(job.model)
        if not recorder:
            raise ModelError(
                f"{type(job.model).__name__} has no attention (nn.Softmax, nn.MultiheadAttention "
                'or a module named "...Attention..."); use penalty_kind="l1" or "log-weights"'
            )
        _recorders[job] = recorder

    def penalty(self, job: Transformed) -> Tensor | None:
        if self.strength == 0:
            return None
        if self.penalty_kind in _OF_WEIGHTS:
            return self.strength * self._of_weights(job)
        seen = _recorders[job].take()
        if not seen:
            raise ModelError(
                "no attention probabilities were seen in the last forward pass: fused attention "
                "does not make them (Hugging Face: load with attn_implementation='eager'), and "
                "the penalty is for passes with gradients"
            )
        chosen = seen[-1:] if self.layers == "last" else seen
        parts = [self._of_attention(a) for a in chosen]
        return self.strength * torch.stack(parts).mean()

    def finish(self, job: Transformed) -> None:
        recorder = _recorders.pop(job, None)
        if recorder is not None:
            recorder.remove()
        select_masks(job, magnitudes(job), job.sparsity or 0.0)

    def _of_attention(self, a: Tensor) -> Tensor:
        if self.penalty_kind == "log":
            return torch.log1p(a.square()).mean()
        entropy: Tensor = torch.special.entr(a.clamp_min(1e-12)).sum(-1).mean()
        return entropy

    def _of_weights(self, job: Transformed) -> Tensor:
        weights = [p.float() for p in job.parameters.values()]
        count = sum(p.numel() for p in weights)
        if self.penalty_kind == "l1":
            return torch.stack([p.abs().sum() for p in weights]).sum() / count
        squares = [torch.log1p((p / self.scale).square()).sum() for p in weights]
        return torch.stack(squares).sum() / count
