"""What claims on mixtures share: byte-level decoders with experts for MLPs, trained on the same
batches for the same seed, and how they route held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.diagnostics.byte_decoder import ByteText, fit_bytes
from sparseworks.experts.upcycling import Mixture
from sparseworks.models.calls import Batch, default_loss
from sparseworks.models.zoo import ByteDecoder, FeedForward

__all__ = ["ByteMixture", "Routes"]


@dataclass(frozen=True)
class Routes:
    """Where held-out tokens went.

    Attributes:
        bytes: `[windows, length]`.
        chosen: per layer, bool `[windows, length, N]`.
        first: per layer, the expert of largest weight `[windows, length]`.
    """

    bytes: Tensor
    chosen: tuple[Tensor, ...]
    first: tuple[Tensor, ...]


@dataclass(frozen=True)
class ByteMixture:
    """A decoder of bytes and how it is trained.

    Args:
        text: what it reads.
        width, layers, hidden: of the decoder and of the MLP in each block.
        lr: of AdamW, after a rise and before a cosine.
        final: share of the rate at the end.
    """

    text: ByteText
    width: int = 64
    layers: int = 2
    hidden: int = 128
    lr: float = 3e-3
    final: float = 0.01

    def dense(self, seed: int) -> nn.Module:
        """Untrained."""
        torch.manual_seed(seed)
        return ByteDecoder(
            self.width, self.layers, 4, context=self.text.length,
            mlp=lambda: FeedForward(self.width, self.hidden),
        )  # fmt: skip

    def mixture(self, method: str, seed: int, *, steps: int, model: Any = None,
                **options: Any) -> Mixture:  # fmt: skip
        """A decoder with mixtures; `model`: dense, changed in place; None: an untrained one."""
        base = self.dense(seed) if model is None else model
        run: Mixture = sw.upcycle(base, method, steps=steps, seed=seed, **options)
        for layer in run.layers.values():
            layer.dense = True  # the same function; faster for experts as narrow as these
        return run

    def fit(
        self,
        subject: nn.Module | Mixture,
        *,
        steps: int,
        seed: int,
        after: Callable[[int], None] | None = None,
        final: float | None = None,
    ) -> nn.Module:
        """Train a dense decoder, or a mixture by its method; random noise is of the seed too."""
        torch.manual_seed(seed)
        run = subject if isinstance(subject, Mixture) else None
        model: Any = subject if run is None else run.model

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            own = default_loss(model, batch)
            return own if run is None else own + run.penalty()

        def passed(step: int, _: Any) -> None:
            if run is not None:
                run.advance()
            if after is not None:
                after(step)
                model.train()

        fit_bytes(
            model, self.text, steps=steps, lr=self.lr, seed=seed, loss=loss, after=passed,
            final=self.final if final is None else final,
        )  # fmt: skip
        if run is not None:
            run.finish()
        return model.eval()  # type: ignore[no-any-return]

    @torch.no_grad()
    def routes(self, run: Mixture, windows: int = 64) -> Routes:
        """Of held-out windows, in evaluation mode."""
        run.model.eval()
        length = self.text.length
        ids = self.text.held[: windows * length].view(windows, length).long()
        run.model(ids)
        found = [x.routing for x in run.layers.values() if x.routing is not None]
        return Routes(
            ids, tuple(r.chosen for r in found), tuple(r.weights.argmax(-1) for r in found)
        )
