"""Spark layers against a gated MLP of as many parameters and exact top-k of as many units."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.activations.spark import statistical_top_k
from sparseworks.activations.spark_layers import SparkAttention, SparkFeedForward
from sparseworks.diagnostics.byte_decoder import ByteText, fit_bytes
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.models.zoo import ByteDecoder, FeedForward

WIDTH, HIDDEN, GATED, LAYERS = 64, 384, 256, 2  # equal parameters
UNITS = round(0.08 * HIDDEN)
TOKENS = 16  # of 64


class Gated(nn.Module):
    """A gated MLP with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, GATED, bias=False)
        self.up = nn.Linear(WIDTH, GATED, bias=False)
        self.down = nn.Linear(GATED, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.gate(x)) * self.up(x))
        return out


def spark() -> SparkFeedForward:
    return SparkFeedForward(WIDTH, HIDDEN, UNITS)


@torch.no_grad()
def shares(model: Any, text: ByteText) -> list[float]:
    """Of the units of each layer that are on, on held-out text."""
    found: list[float] = []
    hooks = [
        b.mlp.down.register_forward_pre_hook(
            lambda m, a: found.append(float((a[0] != 0).double().mean()))
        )
        for b in model.blocks
    ]  # fmt: skip
    model.eval()(text.held.view(-1, text.length).long())
    for hook in hooks:
        hook.remove()
    return found


def faster() -> float:
    """CPU time of torch.topk with a scatter over that of the statistical one, less 1.1."""
    x = torch.randn(64, 8192)
    k = round(0.08 * 8192)

    def exact() -> None:
        values, places = x.topk(k, -1)
        torch.zeros_like(x).scatter_(-1, places, values)

    def spent(call: Callable[[], Any]) -> float:
        began = time.process_time()
        call()
        return time.process_time() - began

    times = [(spent(exact), spent(lambda: statistical_top_k(x, k))) for _ in range(40)][5:]
    return median(t[0] for t in times) / median(t[1] for t in times) - 1.1


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    steps = 1200 if setting == "full" else 320
    text = ByteText.novels(held=16_384)
    found: dict[str, float] = {}

    def arm(name: str, mlp: Callable[[], nn.Module], attention: Any = None, keep: float = 0) -> Any:
        torch.manual_seed(seed)
        model = ByteDecoder(WIDTH, LAYERS, 4, context=64, mlp=mlp, attention=attention)
        if keep:
            ids = {"input_ids": text.held[None, :64].long()}
            sw.sparse_activations(model, "lazy-neuron", sparsity=1 - keep, data=[ids])
        fit_bytes(model, text, steps=steps, lr=3e-3, seed=seed)
        found[f"{name} loss"] = text.loss(model)
        return model

    arm("gated", Gated)
    model = arm("spark", spark)
    on = shares(model, text)
    found |= {"least on": min(on), "most on": max(on)}
    mean = sum(on) / LAYERS
    ends = round(mean * HIDDEN) / HIDDEN
    arm("top-k", lambda: FeedForward(WIDTH, HIDDEN, bias=False), keep=ends)
    both = arm("both", spark, lambda: SparkAttention(WIDTH, 4, TOKENS))
    on_both = shares(both, text)
    found |= {"least on, both": min(on_both), "most on, both": max(on_both)}
    layer: Any = model.blocks[0].mlp
    found["flops of gated"] = layer.flops(mean * HIDDEN) / (2 * 3 * WIDTH * GATED)
    found["over gated"] = found["gated loss"] + 0.05 - found["spark loss"]
    found["over top-k"] = found["top-k loss"] + 0.01 - found["spark loss"]
    found["below gated"] = found["gated loss"] - found["spark loss"]
    found["in range"] = min(min(on) - 0.03, 0.10 - max(on))
    found["attention kept"] = found["gated loss"] + 0.05 - found["both loss"]
    found["faster"] = faster()
    return found


CLAIM = Claim(
    card="123",
    method="spark",
    title="a third of an MLP's operations and a quarter of the tokens, chosen by a threshold, are "
    "enough",
    model=f"byte decoder of width {WIDTH} with {LAYERS} blocks, from scratch: Spark FFN of "
    f"{HIDDEN} units with k = {UNITS}; with Spark attention to {TOKENS} of 64 bytes besides",
    data="novels, another novel held out; 320 steps of 16 windows of 64 bytes (full: 1,200)",
    baseline=f"gated GELU MLP of {GATED} units (equal parameters); GELU MLP of {HIDDEN} units with "
    "as many kept by exact top-k as Spark has on",
    metric="held-out loss, nats a byte; share of units on; CPU time at 64 x 8,192",
    promises=(
        Promise("over gated", "loss at most 0.05 above that of the gated MLP"),
        Promise("over top-k", "loss at most 0.01 above that of exact top-k"),
        Promise("in range", "between 3 and 10 % of the units of every layer are on"),
        Promise("attention kept", "with Spark attention at most 0.05 above the gated MLP"),
        Promise("faster", "torch.topk takes more than 1.1 times the CPU time"),
    ),
    measure=measure,
    looks=(3, 5),
)
