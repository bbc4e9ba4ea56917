"""PST against its own mask without learned importance, LoRA, and all weights, at 90 % sparsity."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from sparseworks.core.selection import keep_top
from sparseworks.diagnostics.byte_decoder import ByteText, fit_bytes, read_bytes, trained_decoder
from sparseworks.diagnostics.claims import Claim, Promise, Setting, data_root
from sparseworks.training.planning import Sparse
from sparseworks.weights.lowrank.pst import LowRankImportance

SPARSITY, LR = 0.9, 3e-3
MAGNITUDE = {"low_rank": 0.0, "structured": 0.0, "through": False}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "pst": ("pst", {"low_rank": 0.1, "structured": 0.1}),  # the scores at a tenth of the lr
    "magnitude, same update": ("pst", MAGNITUDE),
    "magnitude, rank 16": ("pst", {**MAGNITUDE, "rank": 16}),
    "all weights": ("gradual", {}),
}


@torch.no_grad()
def away_from_magnitude(job: Any) -> float:
    """Share of the entries in which the masks are not those of the largest |W'|, %."""
    differ = total = 0
    for name, view in job.views.items():
        part = job.part(name, LowRankImportance)
        kept = keep_top(part.updated(view.parameter).abs(), int(part.mask.sum()))
        differ += int((kept != part.mask).sum())
        total += kept.numel()
    return 100 * differ / total


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    steps = 1000 if full else 150
    base = trained_decoder(ByteText.novels(batch=16), steps=1500 if full else 500)
    wiki = read_bytes(data_root() / "text" / "wikitext2-valid.txt")
    text = ByteText(wiki[:160_000], wiki[160_000:192_768], batch=16 if full else 8)
    found = {"before": text.loss(base)}
    for arm, (method, options) in ARMS.items():
        model = copy.deepcopy(base)
        sparse = Sparse(method, SPARSITY, {**options, "seed": seed})

        def look(step: int, job: Any, arm=arm) -> None:
            if step == steps and arm == "pst":
                found["away from magnitude, %"] = away_from_magnitude(job)
                sides = [sum(v.shape) for v in job.views.values()]
                wanted = sum(16 * side + side for side in sides)
                found["trained beside the head"] = sum(p.numel() for p in job.added.values())
                found["count is the formula"] = 0.5 - abs(found["trained beside the head"] - wanted)

        fit_bytes(model, text, steps=steps, lr=LR, seed=seed, sparse=sparse, after=look)
        found[arm] = text.loss(model)
    found["over magnitude"] = found["magnitude, same update"] - found["pst"]
    found["masks move"] = found["away from magnitude, %"] - 1
    found["over rank 16"] = found["magnitude, rank 16"] - found["pst"]
    found["behind all weights"] = found["pst"] - found["all weights"]
    return found


CLAIM = Claim(
    card="086",
    method="pst",
    title="low-rank importance beside |W| chooses better masks than |W|, at 90 % sparsity",
    model="byte decoder of width 64 with 2 blocks, trained on novels; r1 = r2 = 8",
    data="adapted to 160 KB of WikiText-2, held out from its rest; 150 steps of 8 windows of 64 "
    "bytes (full: 1,000 of 16)",
    baseline="the largest |W'| with the same update; with an update of rank 16 (as many trained "
    "parameters) and with all weights trained (gradual magnitude), both recorded",
    metric="held-out loss, nats a byte",
    promises=(
        Promise("over magnitude", "PST below magnitude with the same update", margin=0.02),
        Promise("masks move", "more than 1 % of the mask is not magnitude's"),
        Promise("over rank 16", "PST below magnitude with an update of rank 16"),
        Promise("count is the formula", "(r1 + r2 + 1)(out + in) parameters train", exact=True),
    ),
    measure=measure,
)
