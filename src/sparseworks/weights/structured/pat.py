"""PAT (Liu et al. 2024, PAT: Pruning-Aware Tuning for Large Language Models, AAAI 2025,
arXiv:2408.14721): the residual stream of a decoder gets narrower while it is tuned.

Hybrid sparsification modules (`hybrid`) scale, mix and mask the stream behind the embedding and
behind attention and MLP of every layer, out = v * m * (x + L1 L0 x), with one mask m for all; the
layers are tuned by LoRA. The base rests. For d' of d channels

    loss = CE + 10 |sum 1[a >= 0] - d'| / d' + mean_{a > 0} (a - 1/2)^2 + mean_{a <= 0} (a + 1/2)^2
           + sum over modules of MSE(L0 L0^T, I).

At the end LoRA is folded, the d' largest a stay, and with A = diag(v) (I + L1 L0)

    W_o, W_down <- (A W)[keep, :],   embedding <- (E A^T)[:, keep],   readers W <- W[:, keep],

norms get the gain sqrt(d / d') and eps d / d': what is left is a standard decoder of width d' that
computes what the masked one did. A tied head keeps E[:, keep].

Adam moves a by about its learning rate a step, and a must have come to 1/2 when m stops learning,
at 0.8 G: in short trainings a needs a rate of its own, 2 / G here. The released merge leaves v out,
and the released loss counts the last L0 alone; here it is as in the paper.

In our quick setting (claim 039: a Llama of width 96 over bytes, 300 steps on another text) three
quarters of the width are 0.072 nats below cutting the least active channels first (0.054 to 0.089),
0.056 below random ones, and as good as LoRA on the whole width; the mask ends within 0.001 of hard.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.core.types import Progress
from sparseworks.models.calls import Batch, TaskLoss, call, logits_of, loss_of
from sparseworks.models.modes import hooked
from sparseworks.training.lora import LowRankUpdates
from sparseworks.training.stepping import train_epochs
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.base import EpochBatches, Fitted, TrainAndCut
from sparseworks.weights.structured.hybrid import HybridSparsification
from sparseworks.weights.structured.sliced import decoder_layers
from sparseworks.weights.structured.slicing import Stream

__all__ = ["PAT", "PATResult", "narrow"]


@dataclass(frozen=True)
class PATResult(Fitted):
    """What the tuning did.

    Args:
        kept: channels of the stream that stay.
        positive: channels with a > 0 at the end.
        softness: largest distance of the last m from 0 or 1.
        loss: mean of the last twentieth of the steps, without the penalties.
    """

    kept: tuple[int, ...]
    positive: int
    softness: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class PAT(TrainAndCut):
    """Tune a decoder while its residual stream gets narrower, then cut it.

    Args:
        width: share of the channels that stay.
        multiple: d' is a multiple of it.
        rank: e, of the modules.
        lora_rank, lora_alpha, lora_dropout: of the updates of all linear layers in blocks.
        anneal: G as a share of all steps.
        lr: of AdamW, a cosine after `warmup` steps.
        mask_lr: of a; None: 2 / G.
        warmup: steps.
        clip: norm of the gradients at most.
        strength: weight of the count.
        seed: of L0 and LoRA's A.
    """

    width: float = 0.75
    multiple: int = 8
    rank: int = 16
    lora_rank: int = 20
    lora_alpha: float = 4.0
    lora_dropout: float = 0.05
    anneal: float = 1 / 3
    lr: float = 5e-5
    mask_lr: float | None = None
    warmup: int = 100
    clip: float = 0.3
    strength: float = 10.0
    seed: int = 0

    info: ClassVar[MethodInfo] = MethodInfo(
        name="pat",
        title="PAT: Pruning-Aware Tuning for Large Language Models",
        authors="Liu et al.",
        year=2024,
        card="039",
        room="weights/structured",
        kind="train-and-cut",
        needs=("data", "training"),
        pattern="channels of the residual stream",
        budget="width=",
        tensors="RMS-norm decoders",
        cost="one tuning of low-rank parameters",
        summary="narrow the residual stream of a decoder while it is tuned",
    )

    def __post_init__(self) -> None:
        whole = (self.multiple, self.rank, self.lora_rank)
        if not 0 < self.width <= 1 or min(whole) < 1 or not 0 <= self.lora_dropout < 1:
            raise InvalidArgument(
                f"pat: width={self.width} in (0, 1], multiple=, rank= and lora_rank= from 1, "
                f"lora_dropout={self.lora_dropout} in [0, 1)"
            )
        if not 0 < self.anneal <= 1 or not self.lr > 0 or not self.clip > 0 or self.warmup < 0:
            raise InvalidArgument(
                f"pat: anneal={self.anneal} in (0, 1], lr={self.lr} and clip={self.clip} above 0, "
                f"warmup={self.warmup} from 0"
            )

    def fit(
        self,
        model: nn.Module,
        example: Batch,
        batches: EpochBatches,
        *,
        epochs: int,
        steps_per_epoch: int,
        loss: TaskLoss | None = None,
        progress: Progress | None = None,
    ) -> PATResult:
        """Tune in place and cut.

        Raises:
            InvalidArgument: the width rounds to nothing, or there are too few steps.
            ModelError: no RMS-norm decoder, or a config that cannot tell the width.
            DataError: the loss is not finite.
        """
        layers = decoder_layers(model)
        backup = Backup()
        Stream(model, layers, backup, False)  # refuses what cannot be cut before it is tuned
        embedding: Any = model.model.embed_tokens  # type: ignore[union-attr]
        whole = int(embedding.weight.shape[1])
        target = int(self.width * whole + 1e-9) // self.multiple * self.multiple
        steps = epochs * steps_per_epoch
        anneal = round(self.anneal * steps)
        if target < 1 or anneal < 2:
            raise InvalidArgument(
                f"pat: width={self.width} of {whole} channels in multiples of {self.multiple}, "
                f"anneal={self.anneal} of {steps} steps: nothing would be left, or no time for it"
            )
        hybrid = HybridSparsification(
            whole, 2 * len(layers) + 1, self.rank, anneal, self.seed, embedding.weight.detach()
        )
        updates = LowRankUpdates(
            {f"{i}.{n}": m for i, layer in enumerate(layers) for n, m in layer.named_modules()
             if isinstance(m, nn.Linear)},
            self.lora_rank, self.lora_alpha, self.lora_dropout, self.seed,
        )  # fmt: skip
        trains = {p: p.requires_grad for p in model.parameters()}
        model.requires_grad_(False)
        with hooked(_all(hybrid.handles(embedding, layers), updates.handles())):
            losses = self._train(
                model, hybrid, updates, batches, target, epochs, steps, loss, progress
            )
        for parameter, flag in trains.items():
            parameter.requires_grad_(flag)
        positive, soft = int((hybrid.logits > 0).sum()), hybrid.mask().detach()
        kept = hybrid.harden(target)
        updates.fold()
        narrow(model, kept, [hybrid.basis(i, kept) for i in range(2 * len(layers) + 1)])
        last = losses[-max(1, len(losses) // 20) :]
        widths = {"model.embed_tokens.weight": (whole, target)}
        softness = float((soft - hybrid.mask()).abs().max())
        return PATResult(widths, tuple(kept.tolist()), positive, softness, sum(last) / len(last))

    def _train(
        self, model: nn.Module, hybrid: HybridSparsification, updates: LowRankUpdates,
        batches: EpochBatches, target: int, epochs: int, steps: int, loss: TaskLoss | None,
        progress: Progress | None,
    ) -> list[float]:  # fmt: skip
        rest = [p for n, p in hybrid.named_parameters() if n != "logits"] + [*updates.parameters()]
        rate = 2 / hybrid.anneal if self.mask_lr is None else self.mask_lr
        optimizer = torch.optim.AdamW(
            [{"params": rest, "lr": self.lr}, {"params": [hybrid.logits], "lr": rate}],
            weight_decay=0.0,
        )

        def factor(step: int) -> float:
            if step < self.warmup:
                return (step + 1) / self.warmup
            t = (step - self.warmup) / max(1, steps - self.warmup)
            return 0.5 * (1 + math.cos(math.pi * t))

        flat = torch.optim.lr_scheduler.LambdaLR(optimizer, [factor, lambda step: 1.0])
        task: list[float] = []

        def total(batch: Any, step: int) -> Tensor:
            hybrid.step = step
            logits = logits_of(call(model, batch))
            plain = loss_of(model, batch, logits) if loss is None else loss(model, batch, logits)
            task.append(float(plain.detach()))
            return plain + hybrid.penalty(target, self.strength)

        def before() -> None:
            nn.utils.clip_grad_norm_(rest, self.clip)

        def after(step: int, mean: float) -> None:
            flat.step()
            if progress is not None:
                progress(step, steps, f"loss {task[-1]:.3f}")

        train_epochs(
            model, batches, total, [optimizer], epochs=epochs, steps=steps, before_step=before,
            after_step=after,
        )  # fmt: skip
        return task


def _all(*several: Any) -> Any:
    for one in several:
        yield from one


@torch.no_grad()
def narrow(model: Any, kept: Tensor, written: list[Tensor]) -> Mapping[str, Any]:
    """Cut the residual stream to some of its channels.

    Args:
        model: a pre-norm decoder with RMS norms.
        kept: indices of the channels that are read, ascending.
        written: `[d, d']` of the embedding, then of attention and MLP of each layer: what these
            write is turned by.

    Returns:
        The fields of the config that tell it.
    """
    own = model.config
    config = copy.deepcopy(own)  # what holds the old one is not told before the cut is done
    for module in model.modules():
        if getattr(module, "config", None) is own:
            module.config = config
    layers = decoder_layers(model)
    stream = Stream(model, layers, Backup(), False)
    stream.fuse_gains()
    read = torch.eye(stream.width, dtype=torch.float64, device=stream.device)[:, kept]
    stream.rotate_ends(written[0], read)
    for i in range(len(layers)):
        stream.rotate_attention(i, read, written[2 * i + 1])
        stream.rotate_mlp(i, read, written[2 * i + 2])
    return stream.told(len(kept))
