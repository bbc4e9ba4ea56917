"""What a training cost, counted as the papers count it: what is masked is skipped.

With f_d and f_s multiply-adds of one sample, dense and under the masks of this step,

    dense step                                  3 f_d
    sparse step                                 3 f_s
    step whose dense gradient is needed (RigL)  2 f_s + f_d

per sample (Evci et al. 2020, Rigging the Lottery, appendix H): the backward pass costs twice the
forward one. So RigL costs (3 f_s dT + 2 f_s + f_d) / (dT + 1) a step on average. The figure is of
arithmetic, not of time: a masked weight saves time only where a kernel skips it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.masks import Masks, masks
from sparseworks.models.calls import Batch
from sparseworks.models.costs import Cost, multiply_adds
from sparseworks.training.driving import Experiment
from sparseworks.training.hooked import Run
from sparseworks.training.loop import Training

__all__ = ["experiment_facts", "model_facts", "step_cost", "training_facts", "training_macs"]


def step_cost(cost: Cost, densities: Mapping[str, float], *, dense_gradient: bool = False) -> float:
    """Multiply-adds of forward and backward of one sample."""
    sparse = cost.sparse(densities)
    return 2 * sparse + (cost.dense if dense_gradient else sparse)


def training_macs(
    cost: Cost,
    looks: Sequence[tuple[int, Mapping[str, float]]],
    *,
    samples: int,
    dense_steps: int = 0,
) -> float:
    """Multiply-adds of a whole training.

    Args:
        cost: of one sample.
        looks: (steps, densities in these steps), rising in time.
        samples: of one step.
        dense_steps: steps that need dense gradients, at the mean density of all.
    """
    steps = sum(count for count, _ in looks)
    total = math.fsum(count * step_cost(cost, densities) for count, densities in looks)
    mean_sparse = total / 3 / max(1, steps)
    return samples * (total + dense_steps * (cost.dense - mean_sparse))


def model_facts(model: nn.Module, example: Batch) -> tuple[Cost, dict[str, Any]]:
    """Cost of a sample, and what the weights are, counted over every parameter.

    Args:
        model: with its mask record, if it has one.
        example: one sample.
    """
    cost = multiply_adds(model, example)
    record = masks(model)
    named = dict(model.named_parameters())
    densities = _densities(record)
    weights = sum(p.numel() for p in named.values())
    zeros = sum(int((p == 0).sum()) for p in named.values())
    masked = {} if record is None else {n: named[n] for n in record if n in named}
    facts: dict[str, Any] = {
        "parameters": weights,
        "nonzeros": weights - zeros,
        "sparsity": 0.0 if record is None else record.sparsity(),
        "zeros": _share(masked),
        "tensors": densities,
        "left_dense": sorted(n for n, p in named.items() if p.ndim > 1 and n not in masked),
        "dense_inference_macs": cost.dense,
        "inference_macs": cost.sparse(densities),
    }
    return cost, facts


def _share(parameters: Mapping[str, Tensor]) -> float:
    """Zeros that are really there, over the masked tensors."""
    zeros = sum(int((p == 0).sum()) for p in parameters.values())
    return zeros / max(1, sum(p.numel() for p in parameters.values()))


def _densities(record: Masks | None) -> dict[str, float]:
    return {} if record is None else {n: 1.0 - record.sparsity(n) for n in record}


def training_facts(training: Training) -> dict[str, Any]:
    """What an audit asks of a finished training, in JSON values.

    A transform (soft gates, scores of all weights) is counted as dense, unless its masks never
    moved: its backward pass needs every weight.
    """
    run, trace = training.run, training.trace
    batch = next(iter(training.batches.epoch(0)))
    cost, facts = model_facts(training.model, _first(batch, training.device))
    rows = [r for r in trace.rows if "tensors" in r]
    moved = any(r["churn"] > 0 or r["sparsity"] != rows[0]["sparsity"] for r in rows)
    by_masks = bool(rows) and (isinstance(run, Run) or not moved)
    looks: list[tuple[int, Mapping[str, float]]] = []
    done = 0
    kept: dict[str, float] = {}
    for row in rows if by_masks else ():  # taken after the step: the masks of the steps to come
        after = {n: 1 - z for n, z in zip(trace.names, row["tensors"]) if n in cost.parameters}
        looks.append((row["step"] - done, kept or after))
        done, kept = row["step"], after
    looks.append((training.steps - done, kept))
    samples = training.plan.batch_size * training.plan.accumulate
    dense_steps = run.dense_steps if isinstance(run, Run) else 0
    peak = max([1 - r["sparsity"] for r in rows], default=1.0) if by_masks else 1.0
    state = [v for s in training.optimizer.state.values() for v in s.values()]
    return {
        **facts,
        "epochs": training.plan.epochs,
        "steps": training.steps,
        "batch_size": samples,
        "samples": training.steps * samples,
        "seconds": sum(row["seconds"] for row in training.history),
        "training_macs": training_macs(cost, looks, samples=samples, dense_steps=dense_steps),
        "counted": "by masks" if by_masks or run is None else "as dense",
        "dense_gradient_steps": dense_steps,
        "peak_density": peak,
        "held_values": facts["parameters"]
        + sum(v.numel() for v in state if isinstance(v, Tensor) and v.numel() > 1),
    }


def experiment_facts(
    experiment: Experiment, example: Batch, *, batch_size: int, per_epoch: int
) -> dict[str, Any]:
    """What an audit asks of a finished experiment: all its trainings together made the model.

    Args:
        experiment: whose model is the result.
        example: one sample.
        batch_size: samples of a step.
        per_epoch: steps of an epoch.
    """
    cost, facts = model_facts(experiment.model, example)
    total, steps, seconds = 0.0, 0, 0.0
    for run in experiment.finished.values():
        seconds += run.figures.get("seconds", 0.0)
        if run.description.get("run") != "train":
            continue
        end = run.description["stop_at"] or run.figures["steps"]
        count = int(end - run.description["first_step"])
        kept = _densities(masks(run.into(experiment.fresh())))
        total += training_macs(cost, [(count, kept)], samples=batch_size)
        steps += count
    return {
        **facts,
        "epochs": steps / per_epoch,
        "steps": steps,
        "batch_size": batch_size,
        "samples": steps * batch_size,
        "seconds": seconds,
        "training_macs": total,
        "counted": "by masks",
        "peak_density": 1.0,
    }


def _first(batch: Any, device: torch.device) -> Any:
    """The inputs of the first sample of a batch."""
    if isinstance(batch, (tuple, list)):
        return _first(batch[0], device)
    if isinstance(batch, Mapping):
        return {k: v[:1].to(device) for k, v in batch.items() if k not in ("labels", "label")}
    return batch[:1].to(device)
