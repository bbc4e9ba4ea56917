"""Wanda against magnitude: encoder fidelity, a layer with outlier inputs, decoder perplexity."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import encoder_subject, language_model_subject


def _encoder(seed: int) -> dict[str, float]:
    dense, calibration, metric = encoder_subject(seed)
    found = {}
    for percent in (50, 60):
        value = {}
        for method in ("wanda", "magnitude"):
            result = sw.prune(
                dense, method, sparsity=percent / 100, data=calibration, copy=True,
                include="encoder.*",
            )  # fmt: skip
            value[method] = metric(result.model)
            found[f"{method} fidelity {percent}"] = value[method]
        found[f"fidelity gain {percent}"] = value["wanda"] - value["magnitude"]
    return found


def _outliers(seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Sequential(nn.Linear(256, 256, bias=False))
    with torch.no_grad():
        layer[0].weight.normal_(generator=generator)
    scale = torch.ones(256)
    scale[torch.randperm(256, generator=generator)[:5]] = 20.0
    x = torch.randn(2048, 256, generator=generator) * scale
    target = layer(x).detach()
    error = {}
    for method in ("wanda", "magnitude"):
        result = sw.prune(layer, method, sparsity=0.5, data=[x], copy=True, pattern="row")
        error[method] = float((result.model(x).detach() - target).square().mean())
    ratio = error["wanda"] / error["magnitude"]
    return {"outlier error ratio": ratio, "outlier gain": 1.0 - ratio}


def _decoder(seed: int, setting: Setting) -> dict[str, float]:
    dense, calibration, metric = language_model_subject(seed, setting)
    found = {"dense perplexity": metric(dense)}
    for percent in (50, 60):
        for method, pattern in (("wanda", "row"), ("magnitude", "unstructured")):
            twin = copy.deepcopy(dense)
            sw.prune(twin, method, sparsity=percent / 100, data=calibration, pattern=pattern)
            found[f"{method} perplexity {percent}"] = metric(twin)
        found[f"perplexity gain {percent}"] = (
            found[f"magnitude perplexity {percent}"] - found[f"wanda perplexity {percent}"]
        )
    return found


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    return {**_encoder(seed), **_outliers(seed), **_decoder(seed, setting)}


CLAIM = Claim(
    card="a01",
    method="wanda",
    title="|w| times the input's norm, per row, prunes better than |w|",
    model="MiniLM-L6 encoder; one Gaussian layer; a 6M-parameter Llama",
    data="WikiText-2 validation sentences (200 calibration, 500 held out); novels",
    baseline="magnitude per tensor (the layer: per row)",
    metric="cosine to the dense embedding; output error; perplexity",
    promises=(
        Promise("fidelity gain 50", "MiniLM fidelity at 50 %: Wanda above magnitude"),
        Promise("fidelity gain 60", "MiniLM fidelity at 60 %: Wanda above magnitude"),
        Promise(
            "outlier gain",
            "2 % of inputs scaled 20x: output error below magnitude's (1 - ratio)",
            margin=0.5,
        ),
        Promise("perplexity gain 50", "decoder perplexity at 50 %: Wanda below magnitude"),
        Promise("perplexity gain 60", "decoder perplexity at 60 %: Wanda below magnitude"),
    ),
    measure=measure,
)
