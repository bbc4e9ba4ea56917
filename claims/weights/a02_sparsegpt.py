"""SparseGPT against Wanda and magnitude: a correlated layer, a decoder, joint rounding."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import encoder_subject, language_model_subject
from sparseworks.weights.oneshot.obs import prepare_hessian, row_grid
from sparseworks.weights.oneshot.refit import refit_rows


def _layer(seed: int) -> dict[str, float]:
    """AR(1) inputs with rho 0.9, 128 features, 50 %."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(4096, 128, generator=generator) * (1 - 0.9**2) ** 0.5
    x = torch.empty_like(steps)
    x[:, 0] = torch.randn(4096, generator=generator)
    for j in range(1, 128):
        x[:, j] = 0.9 * x[:, j - 1] + steps[:, j]
    layer = nn.Sequential(nn.Linear(128, 128, bias=False))
    with torch.no_grad():
        layer[0].weight.normal_(generator=generator)
    dense = layer[0].weight.detach()
    target = x @ dense.t()

    def error(weight: torch.Tensor) -> float:
        return float((x @ weight.t() - target).square().mean())

    results = {
        m: sw.prune(layer, m, sparsity=0.5, data=[x], copy=True) for m in ("wanda", "sparsegpt")
    }
    errors = {m: error(r.model[0].weight.detach()) for m, r in results.items()}
    mask = results["sparsegpt"].masks["0.weight"]
    hessian, _ = prepare_hessian(x.t() @ x, 1e-6)
    exact = error(refit_rows(dense, mask, hessian, iterations=2000, tolerance=1e-8))
    joint = sw.prune(layer, "sparsegpt", sparsity=0.5, data=[x], copy=True, bits=4)
    plain = results["sparsegpt"].model[0].weight.detach()
    grid = row_grid(dense, 4)
    after = torch.stack([grid(c) for c in plain.t()], 1) * mask
    joint_error, after_error = error(joint.model[0].weight.detach()), error(after)
    return {
        "layer error ratio to wanda": errors["sparsegpt"] / errors["wanda"],
        "layer gain": 1.0 - errors["sparsegpt"] / errors["wanda"],
        "above least squares": errors["sparsegpt"] / exact - 1.0,
        "joint 4 bit gain": 1.0 - joint_error / after_error,
    }


def _encoder(seed: int) -> dict[str, float]:
    dense, calibration, metric = encoder_subject(seed)
    found = {}
    for case, amount in (("50", {"sparsity": 0.5}), ("2:4", {"pattern": "2:4"})):
        for method in ("sparsegpt", "wanda"):
            result = sw.prune(
                dense, method, data=calibration, copy=True, include="encoder.*", **amount
            )
            found[f"{method} fidelity {case}"] = metric(result.model)
        gain = found[f"sparsegpt fidelity {case}"] - found[f"wanda fidelity {case}"]
        found[f"fidelity gain {case}"] = gain
    return found


def _decoder(seed: int, setting: Setting) -> dict[str, float]:
    dense, calibration, metric = language_model_subject(seed, setting)
    found = {"dense perplexity": metric(dense)}
    cases = {"50": 0.5, "60": 0.6, "70": 0.7, "2:4": None}
    for case, sparsity in cases.items():
        for method in ("sparsegpt", "wanda", "magnitude"):
            twin = copy.deepcopy(dense)
            pattern = case if sparsity is None else None
            sw.prune(twin, method, sparsity=sparsity, pattern=pattern, data=calibration)
            found[f"{method} perplexity {case}"] = metric(twin)
        best = found[f"sparsegpt perplexity {case}"]
        for other in ("wanda", "magnitude"):
            found[f"gain over {other} {case}"] = found[f"{other} perplexity {case}"] - best
    gap = found["sparsegpt perplexity 70"] - found["dense perplexity"]
    wanda_gap = found["wanda perplexity 70"] - found["dense perplexity"]
    found["gap ratio 70"] = gap / wanda_gap
    found["gap saved 70"] = 1.0 - gap / wanda_gap
    return found


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    return {**_layer(seed), **_encoder(seed), **_decoder(seed, setting)}


CLAIM = Claim(
    card="a02",
    method="sparsegpt",
    title="compensating the kept weights beats choosing them alone",
    model="one layer with AR(1) inputs; MiniLM-L6; a 6M-parameter Llama",
    data="WikiText-2 sentences; novels: 128 x 256 calibration tokens, another novel held out",
    baseline="Wanda and magnitude",
    metric="output error; cosine to the dense embedding; perplexity",
    promises=(
        Promise("layer gain", "AR(1) layer at 50 %: error below Wanda's (1 - ratio)", margin=0.5),
        Promise("above least squares", "not below exact least squares on the same mask"),
        Promise("fidelity gain 50", "MiniLM fidelity at 50 %: above Wanda"),
        Promise("fidelity gain 2:4", "MiniLM fidelity at 2:4: above Wanda"),
        Promise("gain over wanda 50", "perplexity at 50 %: below Wanda"),
        Promise("gain over magnitude 50", "perplexity at 50 %: below magnitude"),
        Promise("gain over wanda 60", "perplexity at 60 %: below Wanda"),
        Promise("gain over wanda 70", "perplexity at 70 %: below Wanda"),
        Promise("gain over magnitude 70", "perplexity at 70 %: below magnitude"),
        Promise("gain over wanda 2:4", "perplexity at 2:4: below Wanda"),
        Promise("gain over magnitude 2:4", "perplexity at 2:4: below magnitude"),
        Promise("gap saved 70", "gap to dense at 70 %: share of Wanda's saved", margin=0.4),
        Promise("joint 4 bit gain", "50 % + 4 bit jointly: error below prune-then-round"),
    ),
    measure=measure,
)
