"""The state of a sparse training as plain values and tensors, and how it is taken back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import Masks

__all__ = ["resume_run", "resume_transform", "state_of_run", "state_of_transform"]

Run = Any  # of `training.hooked`, which imports this
Transformed = Any  # of `training.transformed`, likewise


def state_of_run(run: Run) -> dict[str, Any]:
    """What a hooked run holds beside the model and the optimizers."""
    return {
        "method": run.method.info.name,
        "options": _options(run),
        "step": run.step,
        "dense_steps": run.dense_steps,
        "dense_gradients": {n: t.clone() for n, t in run.dense_gradients.items()},
        "masks": run.record().state_dict(),
        "memory": {n: t.clone() for n, t in run.memory.items()},
    }


def resume_run(run: Run, state: Mapping[str, Any]) -> None:
    """Take back masks, steps and memory; optimizers and weights are the run's.

    Raises:
        InvalidArgument: the state is of another method or of other tensors; nothing was changed.
    """
    mine = _options(run)
    if state["method"] != run.method.info.name or state["options"] != mine:
        raise InvalidArgument(
            f"the state is of method {state['method']!r} with {state['options']}, this run is "
            f"{run.method.info.name!r} with {mine}"
        )
    record = _record(state, run.masks, "run")
    run.step, run.dense_steps = int(state["step"]), int(state.get("dense_steps", 0))
    for name, mask in record.items():
        run.masks[name] = mask.to(run.parameters[name].device)
    device = next((p.device for p in run.parameters.values()), torch.device("cpu"))
    run.memory = {n: t.to(device, copy=True) for n, t in state.get("memory", {}).items()}
    gradients = state.get("dense_gradients", {})
    run.dense_gradients = {n: t.to(device, copy=True) for n, t in gradients.items()}


def _options(run: Run) -> dict[str, Any]:
    """The method's options, with the interval that a default comes to."""
    every = {"every": run.every} if run.every else {}
    return {**registry.options_of(run.method), **every}


def state_of_transform(job: Transformed) -> dict[str, Any]:
    """What a transform holds beside the model and the optimizer."""
    return {
        **_plan(job),
        "step": job.step,
        "masks": job.record().state_dict(),
        "own": job.method.state_dict(job),
    }


def resume_transform(job: Transformed, state: Mapping[str, Any]) -> None:
    """Take it back.

    Raises:
        InvalidArgument: the state is of another method, schedule or of other tensors.
    """
    for key, value in _plan(job).items():
        if state.get(key) != value:
            raise InvalidArgument(f"the state has {key} {state.get(key)!r}, this job {value!r}")
    record = _record(state, job.views, "job")
    job.step = int(state["step"])
    for name, mask in record.items():
        job.set_mask(name, mask.to(job.views[name].parameter.device))
    job.method.load_state_dict(job, state["own"])


def _plan(job: Transformed) -> dict[str, Any]:
    return {
        "method": job.method.info.name,
        "options": registry.options_of(job.method),
        "sparsity": job.sparsity,
        "steps": job.steps,
    }


def _record(state: Mapping[str, Any], names: Iterable[str], what: str) -> Masks:
    record = Masks.from_state_dict(state["masks"])
    if odd := sorted(set(record) ^ set(names)):
        raise InvalidArgument(f"the state and this {what} do not mask the same tensors: {odd[0]!r}")
    return record
