"""CPTQuant on a trained language model: the sensitivity of each tensor, and the bits it gives them.

Levels, mean, grid and sizes were fixed before anything was measured. Sensitivities are measured on
the training text, everything else on another novel. 5 seeds left three promises open, so there are
up to 8, what five CPU-minutes allow.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import language_model_windows
from sparseworks.models.calls import default_loss
from sparseworks.weights.quantization.prefixes import PrefixLosses

MEAN, LEVELS, GRID = 4.0, (6, 4, 3), (0.5, 0.7, 0.9)
MEASURES = {"pruning": "tensor", "taylor": "tensor", "correlation": "block"}


def ranks(values: list[float]) -> torch.Tensor:
    """0 for the smallest."""
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of ranks."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    dense, given, held, _ = language_model_windows(seed, setting)
    many = 16 if setting == "full" else 4
    windows = torch.cat([batch["input_ids"] for batch in given])
    calibration = [{"input_ids": windows[:many]}]
    wide = [{"input_ids": windows[: 4 * many]}]  # correlations need more tokens than width

    @torch.no_grad()
    def loss(model: torch.nn.Module) -> float:
        return sum(float(default_loss(model, batch)) for batch in held) / len(held)

    found = {"dense": loss(dense)}
    uniform = sw.quantize(dense, "rounding", bits=4, group=None, zeros=False, copy=True)
    found["uniform"] = loss(uniform.model)
    for name, per in MEASURES.items():
        data = wide if name == "correlation" else calibration
        given_to = None
        for reverse in (False, True):
            done = sw.quantize(
                dense, "cptquant", data=data, copy=True, bits=MEAN, levels=LEVELS, measure=name,
                per=per, sparsities=GRID, reverse=reverse, given=given_to,
            )  # fmt: skip
            given_to = done.figures["sensitivity"]
            label = f"{name} reversed" if reverse else name
            found[label] = loss(done.model)
            found[f"{label} bits"] = sum(t.bits * t.total for t in done.tensors) / sum(
                t.total for t in done.tensors
            )
            if name == "pruning" and not reverse:
                figures = done.figures
        found[f"{name} over uniform"] = found["uniform"] - found[name]
        found[f"{name} over reversed"] = found[f"{name} reversed"] - found[name]
    truth = {}
    twin: Any = copy.deepcopy(dense)
    with torch.no_grad():
        losses = PrefixLosses(twin, held[:1], default_loss, list(twin.model.layers))
        for tensor in figures["sensitivity"]:  # in the order of the blocks
            losses.skip(int(tensor.split(".")[2]))
            weight = twin.get_submodule(tensor).weight
            kept = weight.clone()
            rounded = sw.quantize(
                dense, "rounding", bits=3, group=None, zeros=False, include=f"{tensor}.weight",
                copy=True,
            )  # fmt: skip
            weight.copy_(rounded.model.get_submodule(tensor).weight)
            truth[tensor] = losses.mean()
            weight.copy_(kept)
    order = list(truth)
    found["rank correlation"] = spearman(
        [figures["sensitivity"][n] for n in order], [truth[n] for n in order]
    )
    sensitive = sorted(order, key=figures["sensitivity"].__getitem__)[-len(order) // 5 :]
    layers = [int(n.split(".")[2]) for n in sensitive]
    found["sensitive fifth, mean block"] = sum(layers) / len(layers)
    return found


CLAIM = Claim(
    card="107",
    method="cptquant",
    title="how much pruning or noise in a layer hurts tells how many bits it needs",
    model="a 6M-parameter Llama, 42 tensors",
    data="novels: 4 x 256 tokens to measure sensitivity; 32 x 256 of another novel held out",
    baseline="4 bits everywhere; the same bits given to the least sensitive",
    metric="held-out loss, nats a token, at a mean of at most 4 bits (6, 4 or 3 a tensor)",
    promises=(
        Promise(
            "rank correlation", "pruning sensitivity ranks tensors as rounding each to 3 bits does",
            margin=0.5,
        ),
        Promise("pruning over uniform", "bits by pruning: below 4 bits everywhere"),
        Promise("pruning over reversed", "bits by pruning: below the reversed choice"),
        Promise("taylor over uniform", "bits by noise: below 4 bits everywhere"),
        Promise("taylor over reversed", "bits by noise: below the reversed choice"),
        Promise("correlation over uniform", "bits by correlation: below 4 bits everywhere"),
        Promise("correlation over reversed", "bits by correlation: below the reversed choice"),
    ),
    measure=measure,
    looks=(3, 5, 8),
)  # fmt: skip
