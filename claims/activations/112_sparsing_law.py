"""CETT: neurons by what they add to the output, against the gate's size alone, at equal shares."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import sparseworks as sw
from sparseworks.activations.calibrating import quantile
from sparseworks.activations.chess import OutputGate
from sparseworks.activations.running import SparseActivations
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import activation_subject


def _gate_sizes(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]):  # type: ignore[no-untyped-def]
    """|act(gate)| of every MLP on calibration data, by the name of its activation."""
    sizes: dict[str, list[torch.Tensor]] = {}
    hooks = [
        m.register_forward_hook(
            lambda m, a, o, n=n: sizes.setdefault(n, []).append(o.abs().flatten(0, 1))
        )
        for n, m in model.named_modules() if n.endswith(".act_fn")
    ]  # fmt: skip
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {n: torch.cat(parts) for n, parts in sizes.items()}


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    model, calibration, metric = activation_subject(seed, setting)
    dense = metric(model)
    found = {"dense perplexity": dense}
    sizes = _gate_sizes(model, calibration)
    every = torch.cat([s.flatten() for s in sizes.values()])
    for percent in (1, 3):
        run = sw.sparse_activations(
            model, "sparsing-law", data=calibration, perplexity=percent / 100
        )
        share = sum(g.rule.share for g in run.gates.values()) / len(run.gates)
        found[f"active {percent}"] = share
        gaps = {"cett": metric(model) - dense}
        run.remove()
        limits = {
            "top-k": {n: quantile(s, 1 - share) for n, s in sizes.items()},
            "fat": dict.fromkeys(sizes, quantile(every, 1 - share)),
        }
        for arm, tau in limits.items():
            gates = {n: OutputGate(torch.tensor([t])) for n, t in tau.items()}
            run = SparseActivations(model, arm, {}, gates)
            gaps[arm] = metric(model) - dense
            run.remove()
        for arm, gap in gaps.items():
            found[f"{arm} gap {percent}"] = gap
        for arm in limits:
            found[f"over {arm} {percent}"] = 0.6 - gaps["cett"] / gaps[arm]
    return found


CLAIM = Claim(
    card="112",
    method="sparsing-law",
    title="neurons chosen by what they add to the output cost less than by their gate",
    model="a 6M-parameter Llama with SwiGLU",
    data="novels: 2,048 calibration tokens, 4,096 tokens of another, others for every seed",
    baseline="the same share of all |gate| of a layer (top-k), and of all layers (FAT)",
    metric="rise of perplexity at the share of neurons at which it is 1 or 3 % on calibration text",
    promises=(
        Promise("over top-k 1", "at most 0.6 of the rise of top-k at PPL-1%"),
        Promise("over top-k 3", "at most 0.6 of the rise of top-k at PPL-3%"),
        Promise("over fat 1", "at most 0.6 of the rise of one threshold for all layers at PPL-1%"),
        Promise("over fat 3", "at most 0.6 of the rise of one threshold for all layers at PPL-3%"),
    ),
    measure=measure,
    seeds=(0, 1, 2, 3, 4),
)
