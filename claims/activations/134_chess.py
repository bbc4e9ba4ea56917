"""CHESS: thresholds of a channel against one of a layer, at equal realised shares.

Up to 8 seeds, because 5 left 50 % open.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.subjects import activation_subject
from sparseworks.models.active import InputGate


def _outputs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of every MLP, on the inputs that it has in the dense model."""
    seen: list[torch.Tensor] = []
    mlps = [m for n, m in model.named_modules() if n.endswith(".mlp")]
    hooks = [m.register_forward_pre_hook(lambda m, a: seen.append(a[0])) for m in mlps]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def _errors(mlps, inputs, wanted) -> list[float]:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return [
            float((m(x) - y).norm() / y.norm())
            for m, x, y in zip(mlps, inputs, wanted, strict=True)
        ]


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    model, calibration, metric = activation_subject(seed, setting)
    dense = metric(model)
    found = {"dense perplexity": dense}
    batch = calibration[0]
    inputs = _outputs(model, batch)
    mlps = [m for n, m in model.named_modules() if n.endswith(".mlp")]
    with torch.no_grad():
        wanted = [m(x) for m, x in zip(mlps, inputs, strict=True)]
    for percent in (50, 70, 80):
        gap, errors = {}, {}
        for name, method, options in (
            ("cats", "cats", {}),
            ("chess", "chess", {"attention": False}),
        ):
            run = sw.sparse_activations(
                model, method, sparsity=percent / 100, data=calibration, **options
            )
            run.reset()
            gap[name] = metric(model) - dense
            found[f"{name} gap {percent}"] = gap[name]
            found[f"{name} share {percent}"] = sum(x.share for x in run.layers()) / len(mlps)
            errors[name] = _errors(mlps, inputs, wanted)
            run.remove()
        found[f"gap {percent}"] = 0.85 - gap["chess"] / gap["cats"]
        found[f"error of every layer {percent}"] = min(
            1 - a / b for a, b in zip(errors["chess"], errors["cats"], strict=True)
        )
    for percent in (50, 70):
        for name, kept in (("q and o", ("q_proj", "o_proj")), ("k and v", ("k_proj", "v_proj"))):
            run = sw.sparse_activations(
                model, "teal", sparsity=percent / 100, data=calibration,
                include=[f"*.{k}" for k in kept],
            )  # fmt: skip
            assert all(isinstance(g, InputGate) for g in run.gates.values())
            found[f"{name} gap {percent}"] = metric(model) - dense
            run.remove()
        found[f"keys and values {percent}"] = (
            found[f"k and v gap {percent}"] - found[f"q and o gap {percent}"]
        )
    return found


CLAIM = Claim(
    card="134",
    method="chess",
    title="a threshold for each channel, by what it multiplies, costs less than one for a layer",
    model="a 6M-parameter Llama",
    data="novels: 2,048 calibration tokens, 4,096 tokens of another, others for every seed",
    baseline="one quantile of |gate| for a layer (CATS)",
    metric="rise of perplexity; output error of each MLP",
    promises=(
        Promise("gap 50", "at most 0.85 of the rise of CATS at 50 %"),
        Promise("gap 70", "at most 0.85 of the rise of CATS at 70 %"),
        Promise("gap 80", "at most 0.85 of the rise of CATS at 80 %"),
        Promise("error of every layer 50", "less output error than CATS in every layer at 50 %"),
        Promise("error of every layer 70", "less output error than CATS in every layer at 70 %"),
        Promise("keys and values 50", "sparse inputs of k and v cost more than of q and o at 50 %"),
        Promise("keys and values 70", "sparse inputs of k and v cost more than of q and o at 70 %"),
    ),
    measure=measure,
    looks=(3, 5, 8),
)
