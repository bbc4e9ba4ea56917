"""CAST's projection costs nothing, and it beats masked rivals at 1:4, on a byte decoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

import sparseworks as sw
from sparseworks.diagnostics.byte_decoder import ByteText, fit_bytes, trained_decoder
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.training.distilling import Distillation
from sparseworks.training.planning import Sparse
from sparseworks.weights.semistructured.adaptive import AST
from sparseworks.weights.semistructured.cast import CAST

DECAY, LR = 1e-2, 4e-3  # sum(lr a) must exceed the losers in few steps
RIVALS = {
    "fixed": ("fixed", {}),
    "ast": ("ast", {"decay": DECAY}),
}


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    steps = 420 if setting == "full" else 120
    text = ByteText.novels(batch=16 if setting == "full" else 8)
    base = trained_decoder(text)
    found = {"before": text.loss(base)}
    dense = copy.deepcopy(base)
    fit_bytes(dense, text, steps=steps, lr=LR, seed=seed)
    found["dense"] = text.loss(dense)
    for pattern in ("1:4", "2:4"):
        model = copy.deepcopy(base)
        ratio: list[float] = []
        last: dict[str, float] = {}

        def before_finish(step, job, ratio=ratio, last=last, model=model):
            if step == steps:
                kept = [(abs(p.detach()), job.masks[n]) for n, p in job.parameters.items()]
                winners = torch.cat([w[m] for w, m in kept]).mean()
                losers = torch.cat([w[~m] for w, m in kept]).mean()
                ratio.append(float(losers / winners))
                last["dense forward"] = text.loss(model)

        fit_bytes(
            model, text, steps=steps, lr=LR, seed=seed, after=before_finish,
            sparse=Sparse("cast", settings={"pattern": pattern, "decay": DECAY}),
            loss=Distillation.of(CAST.recovery, base),
        )  # fmt: skip
        found[f"cast {pattern}"] = text.loss(model)
        found[f"jump {pattern}"] = found[f"cast {pattern}"] - last["dense forward"]
        found[f"loser over winner {pattern}"] = ratio[0]
        found[f"no jump {pattern}"] = 0.005 - found[f"jump {pattern}"]
        found[f"losers vanish {pattern}"] = 1e-3 - ratio[0]
    for rival, (method, options) in RIVALS.items():
        model = copy.deepcopy(base)
        if method == "fixed":
            sw.prune(model, "magnitude", pattern="1:4")
            sparse = Sparse(method)
        else:
            sparse = Sparse(method, settings={"pattern": "1:4", **options})
        fit_bytes(
            model, text, steps=steps, lr=LR, seed=seed, sparse=sparse,
            loss=Distillation.of(AST.recovery, base),
        )  # fmt: skip
        found[f"{rival} distilled 1:4"] = text.loss(model)
    best = min(found[f"{rival} distilled 1:4"] for rival in RIVALS)
    found["over the best rival"] = best - found["cast 1:4"]
    return found


CLAIM = Claim(
    card="077",
    method="cast",
    title="losers vanish while all weights train, so that the projection costs nothing",
    model="byte decoder of width 64 with 2 blocks, trained; its linear layers retrained",
    data="novels, another novel held out; 120 steps of 8 windows of 64 bytes (full: 420 of 16)",
    baseline="the same weights before the projection; fixed magnitude mask and AST, both "
    "distilled; dense with the same steps is recorded",
    metric="held-out loss, nats a byte",
    promises=(
        Promise("no jump 2:4", "2:4: the projection raises the loss by less than 0.005"),
        Promise("no jump 1:4", "1:4: the projection raises the loss by less than 0.005"),
        Promise("losers vanish 2:4", "2:4: mean loser below 0.001 of the mean winner"),
        Promise("over the best rival", "1:4: below the best of the rivals", margin=0.01),
    ),
    measure=measure,
)
