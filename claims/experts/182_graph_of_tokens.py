"""Routers whose tokens share their votes against independent ones, on a byte decoder.

At a constant rate every moment is a draw: on 3 seeds one moment decided nothing, so routes are
compared between six of them and losses are means of three. Up to 20 seeds, what five CPU-minutes
allow, because 12 left what routes tell of bytes open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

from sparseworks.diagnostics.byte_decoder import ByteText
from sparseworks.diagnostics.byte_mixtures import ByteMixture, Routes
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.judging import LOOKS
from sparseworks.experts.chunks import token_information

UNIFORM = 1e9  # a temperature at which every earlier token has the same vote
ARMS: dict[str, dict[str, Any]] = {
    "baseline": {"method": "upcycling"},
    "similarity": {"method": "graph-of-tokens"},
    "attention": {"method": "graph-of-tokens", "by": "attention"},
    "uniform": {"method": "graph-of-tokens", "tau": UNIFORM},
}


def _differ(a: Routes, b: Routes) -> float:
    """Share of tokens whose first expert is another one, mean over layers."""
    return sum(float((x != y).double().mean()) for x, y in zip(a.first, b.first)) / len(a.first)


def _noisy(text: ByteText, seed: int) -> ByteText:
    """With a tenth of the held-out bytes replaced by random ones of the text."""
    g = torch.Generator().manual_seed(seed)
    hit = torch.rand(text.held.shape, generator=g) < 0.1
    drawn = text.train[torch.randint(0, len(text.train), text.held.shape, generator=g)]
    return replace(text, held=torch.where(hit, drawn, text.held))


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    steps = 1200 if setting == "full" else 240
    text = ByteText.novels(held=16_384, batch=16 if setting == "full" else 8)
    setup = ByteMixture(text, hidden=64, final=1.0)
    looks = [steps * p // 100 for p in (50, 60, 70, 80, 90, 100)]
    found: dict[str, float] = {}
    arms = ARMS if setting == "full" else {k: v for k, v in ARMS.items() if k != "uniform"}
    for arm, options in arms.items():
        run = setup.mixture(
            seed=seed, steps=steps, experts=8, top_k=2, start="fresh", **options
        )  # fmt: skip
        seen: list[Routes] = []
        losses: list[float] = []

        def look(
            step: int, run: Any = run, seen: list[Routes] = seen, losses: list[float] = losses
        ) -> None:
            if step in looks:
                seen.append(setup.routes(run))
            if step in looks[-3:]:
                losses.append(text.loss(run.model))

        model = setup.fit(run, steps=steps, seed=seed, after=look)
        found[f"{arm} loss"] = fmean(losses)
        found[f"{arm} rise"] = _noisy(text, seed).loss(model) - losses[-1]
        found[f"{arm} fluctuation"] = fmean(_differ(a, b) for a, b in pairwise(seen))
        found[f"{arm} information"] = fmean(
            token_information(s.bytes, f) for s in seen for f in s.first
        )
    for arm in list(arms)[1:]:
        found[f"{arm} steadier"] = (
            0.85 - found[f"{arm} fluctuation"] / found["baseline fluctuation"]
        )
        found[f"{arm} loss kept"] = 0.01 - (found[f"{arm} loss"] - found["baseline loss"])
    found["informed"] = found["similarity information"] / found["baseline information"] - 0.9
    found["robust"] = found["baseline rise"] - found["similarity rise"]
    return found


CLAIM = Claim(
    card="182",
    method="graph-of-tokens",
    title="tokens that share their votes for experts are routed more steadily",
    model="byte decoder of width 64 with 2 blocks, 8 experts of width 64, top-2, from scratch",
    data="novels, another novel held out; 240 steps of 8 windows of 64 bytes at a constant rate "
    "(full: 1,200 of 16)",
    baseline="the same router without S (full: S = uniform causal average is recorded too)",
    metric="share of held-out tokens whose first expert changes in a tenth of the steps, second "
    "half; held-out loss, nats a byte, mean after 80, 90 and 100 % of the steps",
    promises=(
        Promise("similarity steadier", "similarity: fluctuation at most 0.85 of the baseline's"),
        Promise("similarity loss kept", "similarity: loss at most 0.01 above the baseline's"),
        Promise("informed", "similarity: information of byte and expert at least 0.9 of it"),
        Promise("robust", "similarity: loss rises less with a tenth of the bytes replaced"),
        Promise("attention steadier", "attention: fluctuation at most 0.85 of the baseline's"),
        Promise("attention loss kept", "attention: loss at most 0.01 above the baseline's"),
    ),
    measure=measure,
    looks=(*LOOKS, 20),
    version=2,
)
