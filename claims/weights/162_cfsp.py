"""CFSP: MLP channels by activations, blocks by their change, against magnitude and equal shares.

On 3 seeds losses left relative weights open, so there the distributions of the next token are
compared with the dense model's. 5 seeds left them open, so there are up to 7, what five CPU-minutes
allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.metrics import divergence
from sparseworks.diagnostics.subjects import language_model_windows

ARMS: dict[str, dict[str, Any]] = {
    "cfsp": {"method": "cfsp"},
    "equal": {"method": "cfsp", "slope": 0.0},
    "official": {"method": "cfsp", "slope": 0.0, "norm": "hidden"},
    "magnitude": {"method": "group-norm", "include": "*mlp*"},
}


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    dense, calibration, held, metric = language_model_windows(seed, setting)
    apart = divergence(dense, held)
    found = {"dense loss": math.log(metric(dense))}
    example = {k: v[:1, :32] for k, v in held[0].items()}
    for arm, options in ARMS.items():
        result = sw.slim(
            dense, example, params=0.75, data=calibration, fold="none", uniform=False,
            verify=False, copy=True, **options,
        )  # fmt: skip
        found[f"{arm} loss"] = math.log(metric(result.model))
        if arm in ("official", "equal"):
            found[f"{arm} divergence"] = apart(result.model)
        found[f"{arm} parameters"] = float(result.parameters[1])
    for arm in ("magnitude", "equal"):
        found[f"gain over {arm}"] = found[f"{arm} loss"] - found["cfsp loss"]
    found["relative over plain norms"] = found["official divergence"] - found["equal divergence"]
    found["equal over magnitude"] = found["magnitude loss"] - found["equal loss"]
    return found


CLAIM = Claim(
    card="162",
    method="cfsp",
    title="activations say which MLP channels go, the blocks' change how many",
    model="a 6M-parameter Llama of 6 blocks, 42 % of the MLP channels cut (25 % of all parameters)",
    data="novels: 32 x 256 calibration tokens, 32 windows held out; both drawn anew per seed",
    baseline="channels by the norm of their weights; the same score with equal shares per block",
    metric="loss per token (log-perplexity) and divergence from the dense model, same windows",
    promises=(
        Promise("gain over magnitude", "loss below that of channels cut by magnitude"),
        Promise("gain over equal", "loss below that of equal shares in all blocks"),
        Promise("equal over magnitude", "equal shares: loss below that of magnitude"),
        Promise(
            "relative over plain norms",
            "equal shares: relative weights beat norms alone (divergence)",
        ),
    ),
    measure=measure,
    looks=(3, 5, 7),
    version=2,
)
