"""OFB: one search that learns which units matter and how many of each layer are worth their cost.

A layer with d units has a score z_j per unit and logits a_k over widths r_1 d .. r_K d. With
p = softmax(a) over the widths still alive and rank(j) the place of unit j among descending z,

    u_j = sum_k p_k [rank(j) <= r_k d]              (a staircase, differentiable in a)
    m_j = w sigmoid(z_j) + (1 - w) u_j              (the bi-mask, on activations)

w falls from 0.99 to 0.1 over the warm-up: importance leads first, the budget later. The loss is

    task + 5 ((F(p) - F*) / F_all)^2 + 0.5 sum_layers (one-hot(p) + 1e-4 sum_j sigmoid(z_j)) + PMIM,
    one-hot(p) = H(p) + cot(pi s) / n,   s = sum_k (p_k - 1/n)^2 / (1 - 1/n),

n the number of widths alive. Three times an epoch widths with p_k <= 0.2 / n die, and with the
largest of them the units beyond it. With one width left the gate itself trains, from where it is.
PMIM hides a growing share of patches and reconstructs their pixels from the tokens. At the end the
gates are multiplied into the weights and the units are cut.

Source: Ye, Yu, Ye, Yang, Lin, Chen et al. 2024, Once for Both: Single Stage of Importance and
Sparsity Search for Vision Transformer Compression. Ours: dead units are held at zero until the
end instead of being sliced at once (the same function), layer norms count kept channels only, all
layers have as many widths in equal steps (there a grid of heads and head channels, and finer steps
of the embedding), and the scores have a rate of their own.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.core.types import Progress
from sparseworks.models.calls import Batch, call, logits_of, loss_of, split
from sparseworks.models.coupling import Coupling, trace
from sparseworks.training.stepping import train_epochs
from sparseworks.weights.structured.applying import cut_families, free_families
from sparseworks.weights.structured.base import EpochBatches, Fitted, TrainAndCut
from sparseworks.weights.structured.gates import Gates
from sparseworks.weights.structured.pmim import Pmim
from sparseworks.weights.structured.recovery import TaskLoss, distillation, told
from sparseworks.weights.structured.widths import (
    LearnedWidth,
    cost_table,
    entries,
    expected_flops,
    one_hot,
)

__all__ = ["OFB", "OFBResult"]


@dataclass(frozen=True)
class OFBResult(Fitted):
    """What the search chose.

    Args:
        widths: name of the layer -> units before and after.
        flops: on the example, before and after.
        certainty: least probability of a chosen width when the search ended.
        losses: task loss of every epoch, mean.
    """

    flops: tuple[float, float]
    certainty: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class OFB(TrainAndCut):
    """Search of importance and widths together, then a cut.

    Args:
        flops: share to keep.
        candidates: widths of a layer, in equal steps.
        floor: least share of a layer.
        streams: also the embedding channels (through all blocks, norms and the head).
        warmup: share of the search over which w falls and patches disappear.
        lr: of the weights (AdamW, cosine).
        score_lr: of the scores z (Adam).
        width_lr: of the width logits (Adam).
        weight_decay: of the weights.
        flops_weight: of the FLOPs term.
        layer_weight: of the one-hot and score terms.
        decay_w: let w fall; False keeps it at 0.99 (an ablation: importance alone).
        pmim: weight of the reconstruction, relative to the task loss; 0 for none.
        start: mean of the first z, which are drawn from N(start, 0.2); the logits from U(0, 1).
        patches: name of the module whose output holds the tokens of an image, and the side of a
            patch, for PMIM; None for none.
        seed: of the hidden patches, the first scores and the first logits.
    """

    flops: float = 0.5
    candidates: int = 8
    floor: float = 0.25
    streams: bool = True
    warmup: float = 0.2
    lr: float = 2.5e-4
    score_lr: float = 0.02
    width_lr: float = 0.02
    weight_decay: float = 1e-3
    flops_weight: float = 5.0
    layer_weight: float = 0.5
    decay_w: bool = True
    pmim: float = 1.0
    start: float = 0.0
    patches: tuple[str, int] | None = None
    seed: int = 0

    info: ClassVar[MethodInfo] = MethodInfo(
        name="ofb",
        title="Once for Both: Single Stage of Importance and Sparsity Search for Vision "
        "Transformer Compression",
        authors="Ye et al.",
        year=2024,
        room="weights/structured",
        kind="train-and-cut",
        card="030",
        needs=("data", "loss", "training"),
        pattern="heads, hidden units, embedding channels",
        budget="flops, widths learned",
        cost="one training",
        summary="learn scores of units and widths of layers in one search, then cut",
    )

    def fit(
        self,
        model: nn.Module,
        example: Batch,
        batches: EpochBatches,
        *,
        epochs: int,
        steps_per_epoch: int,
        teacher: nn.Module | None = None,
        loss: TaskLoss | None = None,
        progress: Progress | None = None,
    ) -> OFBResult:
        """Train weights, scores and widths together in place, then cut.

        Args:
            model: a trained transformer.
            example: one batch, on which operations are counted.
            batches: epoch number -> (inputs, target) batches.
            epochs: of the search.
            steps_per_epoch: batches of an epoch.
            teacher: adds distillation from its logits, half of the task loss.
            loss: `(model, batch, logits) -> scalar` of the task; cross-entropy when None.
            progress: called with (done, total, what).

        Raises:
            InvalidArgument: an option is out of range, or FLOPs cannot fall that far.
            ModelError: nothing can be gated.
            DataError: the loss is not finite.
        """
        coupling = trace(model, example)
        layers = self._layers(model, coupling, epochs * steps_per_epoch, self.seed)
        families = [x.family for x in layers]
        table = cost_table(coupling, families)
        whole = coupling.flops()
        total = epochs * steps_per_epoch
        gates = Gates(model, coupling, families)
        hide = None
        if self.patches is not None and self.pmim > 0:
            hide = Pmim(model, example, *self.patches, seed=self.seed)
        extra = [] if hide is None else list(hide.parameters())
        optimizers = [
            torch.optim.AdamW(
                [*model.parameters(), *extra], self.lr, weight_decay=self.weight_decay
            ),
            torch.optim.Adam([x.z for x in layers], self.score_lr),
            torch.optim.Adam([x.a for x in layers], self.width_lr),
        ]
        tasks: list[float] = []

        def objective(batch: Batch, step: int) -> Tensor:
            optimizers[0].param_groups[0]["lr"] = self.lr * _cosine(step / total)
            self._set(gates, layers, self._w(step / total))
            task = self._task(model, batch, teacher, loss, hide, step / total)
            tasks.append(float(task.detach()))
            cost = expected_flops(table, [x.share() for x in layers])
            value = task + self.flops_weight * ((cost / whole - self.flops) ** 2).float()
            for layer in layers:
                value = value + self.layer_weight * self._prior(layer)
            return value

        def after(step: int, _: float) -> None:
            if step % max(1, steps_per_epoch // 3) == 0 and step > self.warmup * total:
                w = self._w((step - 1) / total)
                for layer in layers:
                    layer.kill(0.2)
                    if layer.free is None and int(layer.living.sum()) == 1:
                        optimizers[1].add_param_group({"params": [layer.release(w)]})

        with gates, contextlib.nullcontext() if hide is None else contextlib.closing(hide):
            train_epochs(
                model, batches, objective, optimizers, epochs=epochs, steps=total, after_step=after,
                on_epoch=told(progress, epochs, "searching widths"),
            )  # fmt: skip
            certainty = min(layer.decide() for layer in layers)
            self._set(gates, layers, self._w(1.0))
        model.eval()
        gates.fuse()
        kept = [(x.family, x.kept.cpu().numpy()) for x in layers]
        keep, widths = cut_families(model, example, coupling, kept)
        each = range(0, len(tasks), steps_per_epoch)
        losses = tuple(fmean(tasks[i : i + steps_per_epoch]) for i in each)
        return OFBResult(widths, (whole, coupling.flops(keep)), certainty, losses)

    def _layers(
        self, model: nn.Module, coupling: Coupling, steps: int, seed: int
    ) -> list[LearnedWidth]:
        if not 0 < self.flops < 1 or not 0 <= self.floor < 1 or self.candidates < 2:
            raise InvalidArgument("flops= lies in (0, 1), floor= in [0, 1), candidates= from 2")
        if steps < 1 or not 0 < self.warmup <= 1:
            raise InvalidArgument("epochs and steps_per_epoch are at least 1, warmup= in (0, 1]")
        families = free_families(coupling, self.streams)
        if not families:
            raise ModelError(f"{type(model).__name__} has no group of channels that may be gated")
        device = next(model.parameters()).device
        layers = []
        for i, f in enumerate(families):
            price = 4e-4 if entries(coupling, f) > 1 else 1e-4
            g = generator_for(seed, f"width {i}")
            layers.append(
                LearnedWidth(f, self.candidates, self.floor, self.start, price, device, g)
            )
        shares = [x.widths[0] / x.units for x in layers]
        least = float(expected_flops(cost_table(coupling, families), shares)) / coupling.flops()
        if least > self.flops:
            raise InvalidArgument(
                f"flops={self.flops} cannot be reached: {least:.3f} is left at the least widths; "
                "lower floor= or allow streams=True"
            )
        return layers

    def _w(self, done: float) -> float:
        return 0.99 - 0.89 * min(1.0, done / self.warmup) if self.decay_w else 0.99

    def _set(self, gates: Gates, layers: list[LearnedWidth], w: float) -> None:
        for i, layer in enumerate(layers):
            gates.values[i] = layer.mask(w)
            decided = int(layer.living.sum()) == 1
            gates.weights[i] = layer.kept.float() if decided else None

    def _task(
        self, model: nn.Module, batch: Batch, teacher: nn.Module | None, loss: TaskLoss | None,
        hide: Pmim | None, done: float,
    ) -> Tensor:  # fmt: skip
        inputs, _ = split(batch)
        kept = 0.95 - 0.20 * min(1.0, done / self.warmup)
        shown = inputs if hide is None else hide.hide(inputs, kept)
        logits = logits_of(call(model, shown)).float()
        task = (loss or loss_of)(model, batch, logits)
        if teacher is not None:
            with torch.no_grad():
                guide = logits_of(call(teacher, inputs)).float()
            task = 0.5 * task + 0.5 * distillation(logits, guide, 1.0)
        if hide is None:
            return task
        error = hide.error()
        return task + self.pmim * error * (task.detach() / error.detach().clamp_min(1e-12))

    def _prior(self, layer: LearnedWidth) -> Tensor:
        return one_hot(layer.p()) + layer.price * torch.sigmoid(layer.z).sum()


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))
