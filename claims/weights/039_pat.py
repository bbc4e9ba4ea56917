"""PAT against cutting the residual stream first and tuning then, on a small Llama over bytes.

The base learns the novels, everything is tuned on WikiText-2. Sizes, steps and rates were fixed
before anything was measured; all arms have the same steps, and no fewer trained numbers than PAT.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.diagnostics.byte_decoder import ByteText, fit_bytes, read_bytes
from sparseworks.diagnostics.claims import Claim, Promise, Setting, data_root
from sparseworks.diagnostics.small_llamas import small_llama
from sparseworks.models.calls import default_loss
from sparseworks.models.modes import hooked
from sparseworks.training.lora import LowRankUpdates
from sparseworks.weights.structured.pat import narrow

SIZES = {"quick": (96, 2, 256, 600, 300), "full": (128, 4, 344, 1000, 600)}
RANK, LORA, LR = 16, 8, 1e-3


@functools.cache
def base(setting: Setting) -> nn.Module:
    """The trained dense model, once for all seeds."""
    width, layers, feedforward, steps, _ = SIZES[setting]
    model = small_llama(0, width, layers, feedforward)
    fit_bytes(model, ByteText.novels(), steps=steps, lr=3e-3, seed=0, weight_decay=0.01)
    return model


@torch.no_grad()
def strengths(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean |activation| of each channel of the residual stream, where norms read it."""
    total = torch.zeros(model.config.hidden_size)
    norms = [n for name, n in model.named_modules() if name.endswith("norm")]

    def see(module: nn.Module, args: Any) -> None:
        total.add_(args[0].abs().mean((0, 1)))

    with hooked(n.register_forward_pre_hook(see) for n in norms):
        for batch in batches[:8]:
            model(**batch)
    return total


def cut_to(model: Any, kept: Tensor) -> None:
    """Channels of the stream alone, norms corrected."""
    read = torch.eye(model.config.hidden_size, dtype=torch.float64)[:, kept]
    narrow(model, kept, [read] * (2 * len(model.model.layers) + 1))


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}


def tuned(model: Any, batches: list[dict[str, Tensor]], numbers: int, seed: int) -> nn.Module:
    """LoRA of at least so many numbers, by PAT's rates, folded."""
    layers = linear_layers(model)
    each = sum(m.in_features + m.out_features for m in layers.values())
    updates = LowRankUpdates(layers, -(-numbers // each), 4.0, 0.05, seed)
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(updates.parameters(), LR, weight_decay=0.0)
    rise, steps = len(batches) // 20, len(batches)

    def factor(step: int) -> float:
        t = (step - rise) / max(1, steps - rise)
        return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * t))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with hooked(updates.handles()):
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            torch.autograd.backward(default_loss(model, batch))
            nn.utils.clip_grad_norm_(updates.parameters(), 0.3)
            optimizer.step()
            schedule.step()
    updates.fold()
    return model


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    width, *_, steps = SIZES[setting]
    dense = base(setting)
    raw = read_bytes(data_root() / "text" / "wikitext2-valid.txt")
    cut = len(raw) * 4 // 5
    text = ByteText(raw[:cut], raw[cut : cut + 65_536])
    generator = torch.Generator().manual_seed(seed)
    batches = [text.windows(generator) for _ in range(steps)]
    found = {"base": text.loss(dense)}
    target = width * 3 // 4
    done = sw.slim(
        copy.deepcopy(dense), batches[0], method="pat", data=batches, epochs=1, width=0.75,
        rank=RANK, lora_rank=LORA, anneal=5 / 6, lr=LR, warmup=steps // 20, seed=seed,
    )  # fmt: skip
    found["pat"] = text.loss(done.model)
    kept = len(done.training["kept"])
    found["positive"], found["softness"] = done.training["positive"], done.training["softness"]
    layers = linear_layers(dense)
    places = 2 * len(dense.model.layers) + 1  # type: ignore[arg-type,union-attr]
    numbers = places * (2 * RANK + 1) * width + width
    numbers += LORA * sum(m.in_features + m.out_features for m in layers.values())
    order = strengths(dense.eval(), batches).argsort(descending=True)
    drawn = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    for name, chosen in (("activation", order), ("random", drawn)):
        model = copy.deepcopy(dense)
        cut_to(model, chosen[:target].sort().values)
        found[f"{name} untuned"] = text.loss(model)
        found[name] = text.loss(tuned(model, batches, numbers, seed))
    found["dense tuned"] = text.loss(tuned(copy.deepcopy(dense), batches, numbers, seed))
    found["over activation"] = found["activation"] - found["pat"]
    found["over random"] = found["random"] - found["activation"]
    found["width"] = 1.0 if kept == target == done.model.config.hidden_size else -1.0
    return found


CLAIM = Claim(
    card="039",
    method="pat",
    title="narrowing the residual stream while tuning beats cutting it before",
    model="a Llama over bytes, width 96, 2 layers, 600 steps on novels",
    data="WikiText-2 validation: 300 steps on the first 80 %, 64 KB of the rest held out",
    baseline="the quarter of channels of least mean activation, or of random ones, cut first; LoRA",
    metric="held-out loss, nats a byte, at 3/4 of the width",
    promises=(
        Promise("over activation", "below cutting the least active channels, then LoRA"),
        Promise("over random", "least active channels first: below random ones first"),
        Promise("width", "exactly 3/4 of the channels stay", exact=True),
    ),
    measure=measure,
)
