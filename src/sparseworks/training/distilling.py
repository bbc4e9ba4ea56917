"""Knowledge distillation, one part of recovery for every method: a loss that a teacher guides.

    loss = task CE + kl T^2 KL(softmax(teacher / T) || softmax(student / T))
         + squarehead sum_l mean((f_l^s - f_l^t)^2) / (mean((f_l^t)^2) + eps)
         + features sum_l mean((f_l^s - f_l^t)^2)

CE and KL are means over the rows that have a target (of a language model, tokens 2 .. T without
padding), f_l is what block l gives, its means are over real tokens and channels of the batch, and
eps = 2^-7. The ratio gives every block a weight of order 1, although norms grow with depth.

Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531 (KL); Kurtic et
al. 2023, Sparse Fine-tuning for Inference Acceleration of Large Language Models, arXiv:2310.06927
(SquareHead). Their code takes the hidden states of Hugging Face, of which the last has passed the
final norm; here the last is what the last block gives.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.blocks import find_stages, first_tensor
from sparseworks.models.calls import Batch, call, logits_of, scored, token_mask
from sparseworks.models.modes import evaluating
from sparseworks.models.tap import calibration_mode
from sparseworks.models.views import find_prunable
from sparseworks.training.names import unwrapped

__all__ = ["Distillation", "distillation", "square_head"]

_EPS = 2.0**-7  # of bfloat16, as in the released code


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) over the last axis, mean over the rest.

    Args:
        student: logits `[..., classes]`.
        teacher: logits of the same shape.
        temperature: T; higher values soften both distributions.
    """
    log_p = F.log_softmax(student.float().flatten(0, -2) / temperature, -1)
    q = F.softmax(teacher.float().flatten(0, -2) / temperature, -1)
    return F.kl_div(log_p, q, reduction="batchmean") * temperature**2


def square_head(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    tokens: Tensor | None = None,
    *,
    normalized: bool = True,
) -> Tensor:
    """sum_l mean((f_l^s - f_l^t)^2) / (mean((f_l^t)^2) + eps), over the blocks.

    Args:
        student: what each block gives, `[batch, tokens, channels]` or any other shape.
        teacher: of the same shapes.
        tokens: bool `[batch, tokens]`, False at padding, which is left out.
        normalized: divide by the energy of the teacher's features.
    """
    total = torch.zeros((), device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        a, b = ours.float(), theirs.detach().float()
        if tokens is not None and a.shape[:2] == tokens.shape:
            a, b = a[tokens], b[tokens]
        error = F.mse_loss(a, b)
        total = total + (error / (b.square().mean() + _EPS) if normalized else error)
    return total


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A loss `(model, batch) -> scalar`, for any training loop.

        loss = sw.Distillation(teacher=copy.deepcopy(model), task=1 / 3, kl=2 / 3, temperature=2.0)
        ...
        loss(model, batch).backward()

    Args:
        teacher: a model of the same outputs (and blocks); a copy of the dense model, say. It is
            called in evaluation mode without gradients.
        task: weight of the cross-entropy.
        kl: weight of the divergence from the teacher's distribution.
        temperature: T.
        squarehead: weight of the normalised distance of the features of each block.
        features: weight of the same distance without the normalisation.
        blocks: names of the modules whose outputs are f_l; None: the repeated blocks of the
            teacher, found with the first batch.
        half: the teacher computes in bf16, in a copy of half the size.
        label_smoothing: of the cross-entropy.

    Raises:
        InvalidArgument: a negative weight, no weight at all, a temperature that is not positive, or
            names of blocks that the teacher has not.
    """

    teacher: nn.Module = field(repr=False)
    task: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0
    squarehead: float = 0.0
    features: float = 0.0
    blocks: tuple[str, ...] | None = None
    half: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.task, self.kl, self.squarehead, self.features)
        if min(weights) < 0 or not any(weights) or not self.temperature > 0:
            raise InvalidArgument(
                f"distillation: task={self.task}, kl={self.kl}, squarehead={self.squarehead} and "
                f"features={self.features} must be at least 0 and not all 0, "
                f"temperature={self.temperature} positive"
            )
        known = dict(self.teacher.named_modules())
        odd = [name for name in self.blocks or () if name not in known]
        if odd:
            raise InvalidArgument(f"distillation: the teacher has no module {odd[0]!r}")
        teacher = self.teacher
        if self.half:
            teacher = copy.deepcopy(teacher).to(torch.bfloat16)
        object.__setattr__(self, "teacher", teacher)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch.

        Raises:
            ModelError: features are asked for, but blocks were not found or differ in their shapes.
        """
        blocks = self._found(batch) if self.squarehead or self.features else ()
        with _heard(unwrapped(model), blocks) as ours:
            logits = logits_of(call(model, batch))
        rows, labels = scored(unwrapped(model), batch, logits)
        loss = rows.new_zeros((), dtype=torch.float32)
        if self.task:
            loss = loss + self.task * F.cross_entropy(
                rows.float(), labels, label_smoothing=self.label_smoothing
            )
        if not (self.kl or blocks):
            return loss
        with torch.no_grad(), evaluating(self.teacher), _heard(self.teacher, blocks) as theirs:
            guide, _ = scored(self.teacher, batch, logits_of(call(self.teacher, batch)))
        if self.kl:
            real = labels != -100
            loss = loss + self.kl * distillation(rows[real], guide[real], self.temperature)
        if blocks and [f.shape for f in ours] != [f.shape for f in theirs]:
            raise ModelError("distillation: the blocks of student and teacher differ in shape")
        tokens = token_mask(batch)
        for weight, normalized in ((self.squarehead, True), (self.features, False)):
            if weight:
                loss = loss + weight * square_head(ours, theirs, tokens, normalized=normalized)
        return loss

    def _found(self, batch: Batch) -> tuple[str, ...]:
        """Names of the blocks."""
        if self.blocks is None:
            views = find_prunable(self.teacher, required=False)
            with calibration_mode(self.teacher):
                stages = find_stages(self.teacher, views, batch)
            names = tuple(n for stage in stages for n in getattr(stage, "names", ()))
            if not names:
                raise ModelError(
                    f"distillation: {type(self.teacher).__name__} has no repeated blocks; give "
                    "`blocks`, the names of the modules whose outputs to compare"
                )
            object.__setattr__(self, "blocks", names)
        assert self.blocks is not None
        return self.blocks

    @classmethod
    def of(cls, weights: Mapping[str, Any], teacher: nn.Module, **options: Any) -> Distillation:
        """From the weights that a method names (`recovery`) or a user gives.

        Raises:
            InvalidArgument: an unknown weight.
        """
        known = ("task", "kl", "temperature", "squarehead", "features", "half")
        odd = sorted(set(weights) - set(known))
        if odd:
            raise InvalidArgument(f"distillation has no {odd[0]!r}; it has {', '.join(known)}")
        return cls(teacher=teacher, **weights, **options)


@contextmanager
def _heard(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """What the named modules give while the context is open, in their order."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            hidden = first_tensor(output)
            if hidden is not None:
                found[name] = hidden

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    heard: list[Tensor] = []
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
        heard += [found[n] for n in names if n in found]
