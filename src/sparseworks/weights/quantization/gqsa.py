"""GQSA (Zeng et al. 2024, GQSA: Group Quantization and Sparsity for Accelerating Large Language
Model Inference, arXiv:2412.17560): groups of G weights of a row are pruned, or share a scale.

The unit of sparsity is that of quantization, so that a kept group is whole in itself.

0. Groups of the largest mean w^2 / [H^-1]_jj^2 stay, H from the layer's inputs. A kept group has
   s = (max - min) / (2^b - 1), z = round(-min / s), q = clamp(round(w / s) + z).
1. BQPO, block by block: W, s and z train, rounding passed straight through, for

    min ||F(X; W) - F(X; Q(W * M))||^2,

   X from the compressed blocks before it (`targets="dense"`: the first F on the dense model's X).
2. E2E-OQP: the integers rest; s of all layers trains on the loss of the task, or on the
   divergence from the dense model's distribution.

Stored are a bit a group, and of kept groups the codes, an fp16 scale and z of b bits:
(1 - p) (b + (16 + b) / G) + 1 / G bits a weight (the paper's row pointers and 16-bit columns of
groups take (1 - p) 16 / G instead of the last term). The decoder takes them as `group-int4`.

The paper names code at an anonymous address, which we could not read, so learning rates and epochs
are our own; a zero point moves in units of codes, so it has its own rate. [H^-1]_jj^2 is as the
paper writes it; on our small model other scores of groups do about as well, magnitudes too. The
paper's engine, which hands equal numbers of groups to its workers, is not built here.

In our quick setting (claim 172: a 6M-parameter Llama, 12 windows) the stages win 0.95 and 0.07 nats
of the 1.5 that half of the groups cost. At 2.69 bits a weight that is still 0.36 nats behind 2 bits
in groups of 16 at 3.13, and 0.31 behind 2:4 with 4 bits; at equal bytes plain 3 and 4 bits in
groups of 64 are 0.19 and 0.08 better than 4 bits with pruned groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import Masks, attach, masks
from sparseworks.core.patterns import check_sparsity, parse_pattern
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Loss, default_loss
from sparseworks.models.hooks import duplicate
from sparseworks.models.modes import evaluating
from sparseworks.models.tap import calibration_mode
from sparseworks.training.blockwise import BlockAtWork, walk_blocks
from sparseworks.training.distilling import Distillation
from sparseworks.training.fake_quantization import FakeQuantized, quantized_weights
from sparseworks.weights.oneshot.prune import prune
from sparseworks.weights.quantization.method import Quantization, Work
from sparseworks.weights.quantization.rounding import check_bits
from sparseworks.weights.quantization.saliency import HessianSaliency

__all__ = ["GQSA"]


@dataclass(frozen=True, kw_only=True)
class GQSA(Quantization):
    """Prune groups of weights, and round the others to integers, in the same groups.

    Args:
        sparsity: share of pruned groups; 0: quantization alone, with the same two stages.
        within: prune weights inside of the groups instead, N:M ("2:4"), which tells the sparsity.
        bits: of a code.
        group: G.
        damping: of H, relative to the mean of its diagonal.
        block_epochs: passes over the data for each block; 0: no first stage.
        weight_lr, scale_lr, zero_lr: of Adam in the first stage.
        targets: of a block: the dense block's output on "compressed" or "dense" inputs.
        tune_epochs: passes over the data for the scales of the whole model; 0: no second stage.
        tune_lr: of Adam in the second stage.
        distill: the second stage learns the dense model's distribution instead of the task.
    """

    sparsity: float = 0.5
    within: str | None = None
    bits: int = 4
    group: int = 16
    damping: float = 0.01
    block_epochs: int = 4
    weight_lr: float = 1e-4
    scale_lr: float = 1e-4
    zero_lr: float = 1e-2
    targets: Literal["compressed", "dense"] = "compressed"
    tune_epochs: int = 2
    tune_lr: float = 1e-4
    distill: bool = False

    info: ClassVar[MethodInfo] = MethodInfo(
        name="gqsa",
        title="GQSA: Group Quantization and Sparsity for Accelerating Large Language Model "
        "Inference",
        authors="Zeng et al.",
        year=2024,
        card="172",
        room="weights",
        kind="quantization",
        needs=("data",),
        pattern="groups of consecutive columns of a row",
        cost="second-order evidence, two trainings; a copy of the model",
        summary="prune groups of weights and quantize the rest in the same groups",
    )

    def __post_init__(self) -> None:
        check_bits("gqsa", self.bits, self.group)
        check_sparsity(self.sparsity)
        rates = (self.damping, self.weight_lr, self.scale_lr, self.zero_lr, self.tune_lr)
        if min(self.block_epochs, self.tune_epochs) < 0 or not min(rates) > 0:
            raise InvalidArgument(
                f"gqsa: block_epochs={self.block_epochs} and tune_epochs={self.tune_epochs} from "
                "0, damping and the learning rates above 0"
            )
        if self.within is not None and parse_pattern(self.within).fixed_density is None:
            raise InvalidArgument(f"gqsa: within={self.within!r}; N:M, or None for whole groups")
        if self.targets not in ("compressed", "dense"):
            raise InvalidArgument(f"gqsa: targets={self.targets!r}; 'compressed' or 'dense'")

    def run(self, work: Work) -> None:
        assert work.batches is not None
        if masks(work.model) is not None:
            raise InvalidArgument("gqsa chooses groups by itself: give a model without masks")
        views = work.fitting(self.group)
        dense = duplicate(work.model).requires_grad_(False)
        if self.sparsity > 0 or self.within is not None:
            legal = self.within or f"block1x{self.group}"
            prune(
                work.model, HessianSaliency(pattern=legal, damping=self.damping),
                sparsity=self.sparsity if self.within is None else None, data=work.batches,
                include=[v.name for v in views], seed=work.seed,
            )  # fmt: skip
            record = masks(work.model)
            assert record is not None
            attach(work.model, Masks({n: record.entry(n) for n in record}, self.info.name))
        parts = {v.name: FakeQuantized(v, self.bits, self.group, work.kept(v)) for v in views}
        total = len(views) * (1 + self.tune_epochs)
        if self.block_epochs:
            self._rebuild(work, dense, parts, total)
        for view in views:
            if view.name not in work.entries:  # outside of blocks, or no first stage
                settle(work, parts[view.name])
        if self.tune_epochs:
            loss = work.loss or default_loss
            if self.distill:
                loss = Distillation(teacher=dense, task=0.0, kl=1.0)
            self._tune(work, list(parts.values()), loss, total)
            for part in parts.values():
                work.put(part.view, part.quantized())

    def _rebuild(
        self, work: Work, dense: nn.Module, parts: dict[str, FakeQuantized], total: int
    ) -> None:
        """BQPO; each block is left with its quantized weights."""
        assert work.batches is not None
        done = 0
        errors: dict[str, list[float]] = {}
        with calibration_mode(work.model), evaluating(dense):
            blocks = walk_blocks(
                work.model, dense, [p.view for p in parts.values()], work.batches, self.targets
            )
            for at in blocks:
                own = [parts[v.name] for v in at.views]
                with quantized_weights(work.model, own), torch.enable_grad():
                    errors[at.name] = self._train_block(at, own, work.seed)
                for part in own:
                    settle(work, part)
                done += len(own)
                work.tell(done, total, at.name)
        work.figures["block errors before and after"] = errors

    def _train_block(
        self, at: BlockAtWork, parts: Sequence[FakeQuantized], seed: int
    ) -> list[float]:
        groups = [
            {"params": [p.view.parameter for p in parts], "lr": self.weight_lr},
            {"params": [p.scale for p in parts], "lr": self.scale_lr},
            {"params": [p.zero for p in parts], "lr": self.zero_lr},
        ]
        optimizer = torch.optim.Adam(groups)
        count = len(at.inputs)
        first = _mean_error(at)
        for epoch in range(self.block_epochs):
            order = torch.randperm(count, generator=generator_for(seed, at.name, epoch))
            for i in order.tolist():
                loss = at.error(at.output(i), i)
                _step(optimizer, loss, at.name)
        return [first, _mean_error(at)]

    def _tune(self, work: Work, parts: Sequence[FakeQuantized], loss: Loss, total: int) -> None:
        """E2E-OQP."""
        assert work.batches is not None
        optimizer = torch.optim.Adam([p.scale for p in parts], self.tune_lr)
        with quantized_weights(work.model, parts), evaluating(work.model), torch.enable_grad():
            for epoch in range(self.tune_epochs):
                generator = generator_for(work.seed, "E2E-OQP", epoch)
                for i in torch.randperm(len(work.batches), generator=generator).tolist():
                    _step(optimizer, loss(work.model, work.batches[i]), "the whole model")
                work.tell(len(parts) * (2 + epoch), total, f"scales, epoch {epoch + 1}")


def settle(work: Work, part: FakeQuantized) -> None:
    """The integers of the weight as it is now, in the model."""
    part.freeze(part.view.parameter)
    work.put(part.view, part.quantized())


@torch.no_grad()
def _mean_error(at: BlockAtWork) -> float:
    found = [float(at.error(at.output(i), i)) for i in range(len(at.inputs))]
    return sum(found) / len(found)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, where: str) -> None:
    if not bool(torch.isfinite(loss)):
        raise ModelError(f"gqsa: the loss of {where} is not finite; lower the learning rates")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(held, torch.autograd.grad(loss, held, allow_unused=True)):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()
