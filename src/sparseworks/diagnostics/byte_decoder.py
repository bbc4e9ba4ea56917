"""What claims on a byte-level decoder share: the trained base, its texts, a loop, a held-out loss.

The base is trained once (about a minute on one core) and kept under `runs/subjects`; every arm of a
claim starts from it, or from scratch, and takes the same batches for the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.diagnostics.claims import data_root
from sparseworks.models.calls import Loss, default_loss, logits_of
from sparseworks.models.zoo.decoder import ByteDecoder
from sparseworks.training.planning import Sparse
from sparseworks.training.runs import Finished, Store, digest_of

__all__ = ["ByteText", "fit_bytes", "read_bytes", "trained_decoder"]


@dataclass(frozen=True)
class ByteText:
    """Bytes to train on and bytes held out.

    Args:
        train, held: uint8.
        length: bytes of a window.
        batch: windows of a step.
    """

    train: Tensor
    held: Tensor
    length: int = 64
    batch: int = 16

    @classmethod
    def novels(cls, held: int = 32_768, batch: int = 16) -> ByteText:
        """The novels, and the first bytes of another one."""
        root = data_root() / "text"
        train = read_bytes(root / "novels-train.txt")
        return cls(train, read_bytes(root / "novels-valid.txt")[:held], batch=batch)

    def windows(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A random batch of training windows."""
        first = torch.randint(0, len(self.train) - self.length, (self.batch,), generator=generator)
        places = first[:, None] + torch.arange(self.length)
        return {"input_ids": self.train[places].long()}

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean loss of the held-out bytes in nats; the model is left in evaluation mode."""
        model.eval()
        rows = self.held[: len(self.held) // self.length * self.length].view(-1, self.length)
        total = 0.0
        for part in torch.split(rows, 64):
            ids = part.long()
            logits = logits_of(model(ids))[:, :-1].flatten(0, 1)
            total += float(F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
        return total / (rows.shape[0] * (self.length - 1))


def read_bytes(path: Path) -> Tensor:
    """A file as uint8."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def fit_bytes(
    model: nn.Module,
    text: ByteText,
    *,
    steps: int,
    lr: float,
    seed: int,
    sparse: Sparse | None = None,
    loss: Loss = default_loss,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    final: float = 0.01,
    after: Callable[[int, Any], Any] | None = None,
    optimizer: Callable[[Any, float], torch.optim.Optimizer] | None = None,
) -> Any:
    """Train with AdamW: a rise over a twentieth of the steps, then a cosine to `final` of lr.

    Args:
        sparse: the method; None: dense.
        after: called with (step, run) after each step.
        optimizer: makes another one, of (parameters, lr).

    Returns:
        The run, finished; None of a dense training.
    """

    def build(parameters: Any) -> torch.optim.Optimizer:
        if optimizer is not None:
            return optimizer(parameters, lr)
        return torch.optim.AdamW(parameters, lr, betas, weight_decay=weight_decay)

    if sparse is None:
        run, stepping = None, build(model.parameters())
    else:
        run, stepping = sparse.begin(model, steps, build)
    rise = max(1, steps // 20)

    def factor(step: int) -> float:
        t = (step - rise) / max(1, steps - rise)
        if step < rise:
            return (step + 1) / rise
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * t))

    schedule = torch.optim.lr_scheduler.LambdaLR(stepping, factor)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(1, steps + 1):
        stepping.zero_grad()
        torch.autograd.backward(loss(model, text.windows(generator)))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepping.step()
        schedule.step()
        if after is not None:
            after(step, run)
    if run is not None:
        run.finish()
    return run


def trained_decoder(text: ByteText, *, steps: int = 1500, folder: str = "runs/subjects") -> Any:
    """The dense base: `ByteDecoder()` after `steps` steps at 3e-3; trained once, then read.

    Args:
        folder: where it is kept.
    """
    described = {"model": "ByteDecoder", "steps": steps, "lr": 3e-3, "seed": 0, "version": 1,
                 "bytes": len(text.train), "torch": torch.__version__}  # fmt: skip
    store, digest = Store(folder), digest_of(described)
    torch.manual_seed(0)
    model = ByteDecoder()
    if store.find(digest) is None:
        fit_bytes(model, text, steps=steps, lr=3e-3, seed=0, weight_decay=0.01)
        figures = {"loss": text.loss(model)}
        store.keep(Finished("byte decoder", digest, described, figures, store), model)
    else:
        store.fill(digest, model)
    sw.attach(model, None)
    return model
