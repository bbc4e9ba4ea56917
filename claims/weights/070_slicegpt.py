"""SliceGPT: the least principal directions of the stream against its columns and random ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import language_model_windows

ARMS = {
    "pca": {"basis": "block"},
    "shared": {"basis": "shared"},
    "magnitude": {"basis": "shared", "order": "magnitude"},
    "variance": {"basis": "shared", "order": "variance"},
    "random": {"basis": "block", "order": "random"},
}


@torch.no_grad()
def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    dense, calibration, held, metric = language_model_windows(seed, setting)
    few = held[0]["input_ids"][:1]
    whole = sw.slim(dense, held[0], method="slicegpt", slicing=0.0, data=calibration[:1], copy=True)
    expected = dense(few).logits
    change = float((whole.model(few).logits - expected).abs().max() / expected.abs().max())
    found = {
        "dense loss": math.log(metric(dense)),
        "change by rotating": change,
        "unchanged before slicing": 1e-5 - change,
    }
    for arm, options in ARMS.items():
        result = sw.slim(
            dense, held[0], method="slicegpt", slicing=0.25, data=calibration, copy=True,
            seed=seed, **options,
        )  # fmt: skip
        found[f"{arm} loss"] = math.log(metric(result.model))
        found[f"{arm} flops"] = result.flops[1] / result.flops[0]
    for arm in ("magnitude", "variance", "random"):
        found[f"gain over {arm}"] = found[f"{arm} loss"] - found["pca loss"]
    found["shared gain over magnitude"] = found["magnitude loss"] - found["shared loss"]
    return found


CLAIM = Claim(
    card="070",
    method="slicegpt",
    title="deleting principal directions of the residual stream beats deleting its columns",
    model="a 6M-parameter Llama of width 256, 25 % of the width deleted",
    data="novels: 32 x 256 calibration tokens, 32 windows held out; both drawn anew per seed",
    baseline="the same share of columns by magnitude, or by variance; a random orthogonal basis",
    metric="loss per token (log-perplexity) on the same windows",
    promises=(
        Promise("unchanged before slicing", "largest change of a logit by rotating below 1e-5"),
        Promise("gain over magnitude", "loss below that of deleting columns by magnitude"),
        Promise("gain over variance", "loss below that of deleting columns by variance"),
        Promise("gain over random", "loss below that of a random orthogonal basis"),
        Promise(
            "shared gain over magnitude",
            "one basis for all blocks, a standard model: loss below columns by magnitude",
        ),
    ),
    measure=measure,
)
