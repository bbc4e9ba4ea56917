"""What `train` and `tickets` record of a run, so that `sparseworks audit` can compare it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

__all__ = ["source_digest", "start_macs", "tickets_record", "train_record"]

_PLAN = ("epochs", "batch_size", "seed", "distill", "temperature")  # told apart, or not used here


def source_digest(source: str | None) -> str | None:
    """The hash of a file; of a folder, of names and sizes in it; a built-in name as it is."""
    if source is None:
        return None
    path = Path(source)
    h = hashlib.blake2b(digest_size=8)
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                h.update(block)
        return h.hexdigest()
    if path.is_dir():
        for inner in sorted(p for p in path.rglob("*") if p.is_file()):
            h.update(f"{inner.relative_to(path)} {inner.stat().st_size}".encode())
        return h.hexdigest()
    return source


def start_macs(options: Any, scratch: bool) -> float | None:
    """What the starting weights cost: 0 from scratch, a recorded training's, else unknown."""
    if options.start is None:
        return 0.0 if scratch else None
    try:
        found = json.loads((Path(options.start).parent / "result.json").read_text())["record"]
        before = found["start_macs"]
        return None if before is None else float(found["training_macs"] + before)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _common(options: Any, machine: dict[str, Any]) -> dict[str, Any]:
    evaluated = source_digest(options.eval_data)
    same = evaluated is not None and evaluated == source_digest(options.data)
    return {
        "method": options.method,
        "data": f"{source_digest(options.data)} {options.samples or 'all'}",
        "seed": options.seed,
        "nominal_sparsity": options.sparsity,
        "eval_data": None if evaluated is None else f"{evaluated} {options.eval_samples or 'all'}",
        "eval_is_training": None if evaluated is None else same,
        "machine": {k: machine[k] for k in ("cpu", "threads") if k in machine},
    }


def _scored(metric: Any, score: float | None) -> dict[str, Any]:
    if metric is None or score is None:
        return {}
    return {
        "metric": metric.name,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "score": score,
    }


def train_record(
    job: Any, options: Any, score: float | None, machine: dict[str, Any]
) -> dict[str, Any]:
    """The facts of a finished training."""
    from sparseworks.cli.training import ZOO
    from sparseworks.diagnostics.costs import training_facts

    training = job.training
    batches = training.batches
    plan = dataclasses.asdict(training.plan)
    return {
        **_common(options, machine),
        **_scored(job.metric, score),
        **training_facts(training),
        "train_samples": len(batches) * training.plan.batch_size,
        "chosen_on": "nothing",  # the last epoch is what is reported, whatever it scores
        "start": job.start,
        "start_macs": start_macs(options, options.model in ZOO),
        "recipe": {k: v for k, v in plan.items() if k not in _PLAN} | _taught(options),
        "pattern": None if training.run is None else str(training.run.pattern),
        "budget": None if training.run is None else str(training.run.budget),
    }


def _taught(options: Any) -> dict[str, str]:
    """The teacher, where there is one."""
    if options.teacher is None:
        return {}
    teacher = options.teacher if options.teacher == "start" else source_digest(options.teacher)
    return {"teacher": " ".join([str(teacher), *options.distill])}


def tickets_record(
    options: Any,
    done: Any,
    subject: Any,
    recipe: Any,
    metric: Any,
    score: float | None,
    machine: dict[str, Any],
) -> dict[str, Any]:
    """The facts of an experiment: all its trainings together made the model."""
    from sparseworks.cli.training import ZOO
    from sparseworks.diagnostics.costs import experiment_facts

    example = subject.train.normalized(slice(0, 1)).to(next(done.model.parameters()).device)
    per_epoch = len(subject.train) // options.batch_size
    return {
        **_common(options, machine),
        **_scored(metric, score),
        **experiment_facts(done, example, batch_size=options.batch_size, per_epoch=per_epoch),
        "train_samples": per_epoch * options.batch_size,
        "chosen_on": "held-out training images",
        "start": done.to_dict()["model"],
        "start_macs": start_macs(options, options.model in ZOO),
        "recipe": {k: v for k, v in dataclasses.asdict(recipe).items() if k not in _PLAN},
        "pattern": str(done.pattern),
        "budget": str(done.budget),
    }
