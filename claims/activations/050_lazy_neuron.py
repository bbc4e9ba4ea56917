"""Do ReLU units become sparse by training alone, and what does keeping only k of them cost?

The figures of runs with permuted targets are recorded beside: where they become sparse too, the
data have no part in it. Robustness to label noise and calibration are not measured.

5 seeds left four promises open, so there are up to 8; figures without a promise are measured on the
first 3, for time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.activations.lazy_neuron import unit_densities
from sparseworks.diagnostics.byte_decoder import ByteText, fit_bytes
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.models.calls import Batch, logits_of
from sparseworks.models.zoo import ByteDecoder, FeedForward

LAYERS, WIDE = 2, 1024
ENDS = [f"blocks.{i}.mlp.down" for i in range(LAYERS)]


def _decoder(seed: int, hidden: int) -> nn.Module:
    torch.manual_seed(seed)
    return ByteDecoder(
        64, LAYERS, 4, context=64, mlp=lambda: FeedForward(64, hidden, F.relu, bias=False)
    )


def _permuted(seed: int):  # type: ignore[no-untyped-def]
    """The usual loss with the targets of a batch in random order."""
    g = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(batch, Mapping)
        ids = batch["input_ids"]
        target = ids[:, 1:].flatten()
        logits = logits_of(model(ids))[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, target[torch.randperm(len(target), generator=g)])

    return loss


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    steps = 1500 if setting == "full" else 400
    text = ByteText.novels(held=16_384)
    g = torch.Generator().manual_seed(seed)
    seen = [text.windows(g) for _ in range(8)]
    held = [{"input_ids": text.held.view(-1, text.length).long()}]
    found: dict[str, float] = {}

    def densities(name: str, model: nn.Module) -> None:
        for place, batches in (("train", seen), ("held", held)):
            layers = unit_densities(model, ENDS, batches)
            found[f"{name} density, {place}"] = sum(x.density for x in layers) / LAYERS
            found[f"{name} live density, {place}"] = sum(x.live_density for x in layers) / LAYERS
            found[f"{name} dead, {place}"] = max(x.dead for x in layers)

    beside = seed < 3
    arms = [("relu", 256), ("wide", WIDE), *([("permuted", 256)] if beside else [])]
    for name, hidden in arms:
        model = _decoder(seed, hidden)
        densities(f"{name} start", model)
        more = {"loss": _permuted(seed)} if name == "permuted" else {}
        fit_bytes(model, text, steps=steps, lr=3e-3, seed=seed, **more)
        densities(name, model)
        found[f"{name} loss"] = text.loss(model)
    for percent in (10, 5, 2) if beside else (10,):
        model = _decoder(seed, 256)
        sw.sparse_activations(model, "lazy-neuron", sparsity=1 - percent / 100, data=held)
        fit_bytes(model, text, steps=steps, lr=3e-3, seed=seed)
        found[f"top {percent} loss"] = text.loss(model)
    for name in ("relu", "wide"):
        ratio = found[f"{name} density, train"] / found[f"{name} start density, train"]
        found[f"{name} sparser"] = 0.65 - ratio
    found["wider is sparser"] = found["relu density, train"] - found["wide density, train"]
    found["held out too"] = found["relu density, held"] - found["wide density, held"]
    found["alive"] = 0.05 - max(found["relu dead, held"], found["wide dead, held"])
    found["top 10 kept"] = found["relu loss"] + 0.05 - found["top 10 loss"]
    return found


CLAIM = Claim(
    card="050",
    method="lazy-neuron",
    title="ReLU units become sparse by training alone, and a tenth of them is enough",
    model="byte decoder of width 64 with 2 blocks, ReLU MLPs of 256 and 1,024 units without biases",
    data="novels, another novel held out; 400 steps of 16 windows of 64 bytes (full: 1,500), no "
    "weight decay",
    baseline="the same model before training; the dense ReLU model for top-k",
    metric="share of the units of a token above 0, mean over layers; held-out loss, nats a byte",
    promises=(
        Promise("relu sparser", "256 units: at most 0.65 of the density before training"),
        Promise("wide sparser", "1,024 units: at most 0.65 of the density before training"),
        Promise("wider is sparser", "1,024 units are sparser than 256"),
        Promise("held out too", "in the same order on held-out text"),
        Promise("alive", "in every layer less than 5 % of the units are never active"),
        Promise("top 10 kept", "trained with a tenth of 256 units: loss at most 0.05 above"),
    ),
    measure=measure,
    looks=(3, 5, 8),
)
