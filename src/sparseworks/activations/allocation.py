"""How sparse each layer of a block is: TEAL's greedy choice (Liu et al. 2024, algorithm 1).

From 0, the layer whose step upwards adds least error to the output of its block goes up, by
0.025 of a block's weights, until their mean is the wanted sparsity; no layer goes beyond 0.95.
Error: ||y - y'||^2 over the last quarter of the positions, which see the longest past.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.activations.calibrating import Family, Job
from sparseworks.activations.method import InputMethod
from sparseworks.core.errors import ModelError
from sparseworks.models.active import Gate, attached
from sparseworks.models.blocks import Stack, find_stages, first_tensor

__all__ = ["greedy"]

_STEP = 0.025
_MOST = 0.95
_LAST = 0.25  # of the positions

Names = tuple[str, ...]


def greedy(method: InputMethod, job: Job) -> dict[str, Gate]:
    """A gate for each layer.

    Raises:
        ModelError: the model has no blocks that follow each other.
    """
    families = method.families(job)
    stacks = [s for s in find_stages(job.model, job.views, job.batches[0]) if isinstance(s, Stack)]
    if not stacks:
        raise ModelError(f"{type(job.model).__name__} has no blocks that follow each other")
    found: dict[str, Gate] = {}
    for stack in stacks:
        calls = _calls(job, stack)
        for name, block in zip(stack.names, stack.blocks, strict=True):
            inside = {ns: f for ns, f in families.items() if ns[0].startswith(f"{name}.")}
            if not inside:
                continue
            levels = _block(job, block, calls[name], inside)
            found |= {n: inside[ns](s) for ns, s in levels.items() for n in ns}
    outside = {ns: f for ns, f in families.items() if any(n not in found for n in ns)}
    return found | {n: f(job.sparsity) for ns, f in outside.items() for n in ns}


def _calls(job: Job, stack: Stack) -> dict[str, list[tuple[Any, Any]]]:
    """Arguments of every block, of the first batch."""
    seen: dict[str, list[tuple[Any, Any]]] = {n: [] for n in stack.names}
    handles = []
    for name, block in zip(stack.names, stack.blocks, strict=True):

        def keep(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            seen[name].append((args, {k: v for k, v in kwargs.items() if "cache" not in k
                                      and "past" not in k}))  # fmt: skip

        handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        job.watch({}, {}, job.batches[:1])
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _block(job: Job, block: nn.Module, calls: list[tuple[Any, Any]],
           families: dict[Names, Family]) -> dict[Names, float]:  # fmt: skip
    sizes = {v.module_name: v.parameter.numel() for v in job.views}
    weights = {ns: sum(sizes[n] for n in ns) for ns in families}
    whole = sum(weights.values())
    share = {ns: w / whole for ns, w in weights.items()}
    modules = {ns: [job.model.get_submodule(n) for n in ns] for ns in families}
    wanted = _outputs(block, calls)
    levels = dict.fromkeys(families, 0.0)

    def error(raised: Names, level: float) -> float:
        at = {ns: level if ns == raised else levels[ns] for ns in families}
        gates = [(m, families[ns](s)) for ns, s in at.items() if s > 0 for m in modules[ns]]
        with attached(gates):
            return float((_outputs(block, calls) - wanted).square().sum())

    while True:
        mean = sum(share[ns] * levels[ns] for ns in families)
        left = job.sparsity - mean
        if left < 1e-6:
            return levels
        steps = {}
        for ns in families:
            up = min(levels[ns] + min(_STEP, left) / share[ns], _MOST)
            if up > levels[ns] + 1e-9:
                steps[ns] = up
        if not steps:
            return levels
        best = min(steps, key=lambda ns: error(ns, steps[ns]) if len(steps) > 1 else 0.0)
        levels[best] = steps[best]


def _outputs(block: nn.Module, calls: list[tuple[Any, Any]]) -> Tensor:
    found = []
    for args, kwargs in calls:
        output = first_tensor(block(*args, **kwargs))
        assert output is not None
        first = int(output.shape[1] * (1 - _LAST)) if output.ndim > 2 else 0
        found.append(output[:, first:] if output.ndim > 2 else output)
    return torch.cat([t.flatten() for t in found])
