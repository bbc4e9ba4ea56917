"""The arms of a comparison: recorded runs, or what a user says of runs made elsewhere.

A source is a folder of `sparseworks train`, `tickets` or `prune`, its result.json, or a description
in JSON or YAML: a mapping, a list of mappings, or {"runs": [...]}. Keys of a description:

    name, method ("dense" for none), seed or seeds, score or scores, metric, higher_is_better
    folder          a recorded run whose facts are the base; what else is said here comes over it
    bench           a bench.json, for the measured latency
    trials          settings of hyperparameters that were tried to get here
    chosen_on       what checkpoints and hyperparameters were chosen on: "nothing", "validation",
                    or "test" where it is the data of the score
    eval_data       name or hash of what the score is measured on
    eval_is_training  whether that is the data that was trained on
    data, train_samples, epochs, steps, batch_size, samples (seen), recipe {name: value}
    start           name or hash of the weights it starts from; start_macs: what they cost
    training_macs, inference_macs, dense_inference_macs, seconds, machine
    sparsity        measured, over the masked tensors; nominal_sparsity: what was asked for
    zeros           exact zeros over the masked tensors; parameters, nonzeros: of the whole model
    tensors         {name: density} of the masked ones; left_dense: names of those that are not
    peak_density    largest density in training
    speedup         claimed; latency_ms and latency_backend: measured
    when, path      see `taxonomy`; taken from the method where it is a registered one

Runs that differ in nothing but the seed are one arm.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseworks.core import registry
from sparseworks.core.errors import DataError, InvalidArgument, MissingDependency
from sparseworks.diagnostics.taxonomy import taxonomy

__all__ = ["KEYS", "Arm", "Source", "read_arms"]

Source = str | Path | Mapping[str, Any]

_IDENTITY = {
    "name", "method", "nominal_sparsity", "pattern", "budget", "recipe", "data", "train_samples",
    "eval_data", "metric", "epochs", "steps", "batch_size", "trials", "chosen_on",
}  # fmt: skip
KEYS = frozenset(_IDENTITY) | {
    "seed", "seeds", "score", "scores", "unit", "higher_is_better", "folder", "bench",
    "eval_is_training", "samples", "start", "start_macs", "training_macs", "counted",
    "inference_macs", "dense_inference_macs", "dense_gradient_steps", "seconds", "machine",
    "sparsity", "zeros", "parameters", "nonzeros", "tensors", "left_dense", "peak_density",
    "held_values", "speedup", "latency_ms", "latency_backend", "when", "path",
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        name: of the arm.
        runs: the facts of each of its runs; one per seed.
    """

    name: str
    runs: tuple[Mapping[str, Any], ...]

    def facts(self, key: str) -> list[Any] | None:
        """A fact of every run; None where a run lacks it."""
        found = [r.get(key) for r in self.runs]
        return None if any(v is None for v in found) else found

    def number(self, key: str) -> float | None:
        """The mean of a fact over the runs; None where a run lacks it."""
        found = self.facts(key)
        return None if found is None else statistics.fmean(float(v) for v in found)

    def one(self, key: str) -> Any:
        """A fact that all runs of an arm share; None where one lacks it."""
        found = self.facts(key)
        return None if found is None else found[0]

    @property
    def dense(self) -> bool:
        """Nothing is masked or removed."""
        return self.one("method") == "dense" or self.number("sparsity") == 0

    @property
    def scores(self) -> dict[Any, float]:
        """Seed -> score, of the runs that have one."""
        return {r.get("seed", i): r["score"] for i, r in enumerate(self.runs) if "score" in r}


def read_arms(sources: Iterable[Source]) -> list[Arm]:
    """The arms of all sources, in their order.

    Args:
        sources: paths, "name=path" for an arm of this name, or descriptions as mappings.

    Raises:
        InvalidArgument: a source is not there, or a description has a key that nobody reads.
        DataError: a file cannot be read.
    """
    runs = [run for source in sources for run in _expand(source)]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        named = run.get("named")
        mark = {k: v for k, v in run.items() if k in _IDENTITY}
        key = named or json.dumps(mark, sort_keys=True, default=str)
        groups.setdefault(key, []).append({k: v for k, v in run.items() if k != "named"})
    arms: list[Arm] = []
    for made in groups.values():
        name = str(made[0].get("name") or made[0].get("method") or f"run {len(arms) + 1}")
        taken = sum(a.name == name or a.name.startswith(f"{name} (") for a in arms)
        arms.append(Arm(f"{name} ({taken + 1})" if taken else name, tuple(made)))
    return arms


def _expand(source: Source) -> list[dict[str, Any]]:
    """The runs of one source."""
    if isinstance(source, Mapping):
        return _described(source, "a description", Path())
    text = str(source)
    name, equals, rest = text.partition("=")
    named = equals and not Path(text).exists()
    path = Path(rest if named else text)
    if path.is_dir():
        runs = [_recorded(path)]
    elif not path.is_file():
        raise InvalidArgument(f"{path}: no such folder or file; give recorded runs or descriptions")
    elif path.name == "result.json":
        runs = [_recorded(path.parent)]
    else:
        runs = _described(_parsed(path), str(path), path.parent)
    if named:
        runs = [{**r, "name": name, "named": name} for r in runs]
    return runs


def _parsed(path: Path) -> Any:
    text = path.read_text()
    if path.suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError:
            raise MissingDependency(
                f"{path}: YAML needs pip install pyyaml; or write it as JSON"
            ) from None
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise DataError(f"{path}: not YAML ({error})") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error})") from None


def _described(value: Any, where: str, folder: Path) -> list[dict[str, Any]]:
    if isinstance(value, Mapping) and set(value) == {"runs"}:
        value = value["runs"]
    if isinstance(value, list):
        return [run for item in value for run in _described(item, where, folder)]
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{where}: a run is described by a mapping, not {value!r}")
    odd = sorted(set(value) - KEYS)
    if odd:
        raise InvalidArgument(
            f"{where}: {odd} are not facts of a run; there are {', '.join(sorted(KEYS))}"
        )
    said = {k: v for k, v in value.items() if v is not None}
    base: dict[str, Any] = {}
    if "folder" in said:
        base = _recorded(folder / said["folder"])
    if "bench" in said:
        base |= _benched(folder / said.pop("bench"))
    facts = {**base, **said}
    scores, seeds = facts.pop("scores", None), facts.pop("seeds", None)
    if scores is None and seeds is None:
        return [_completed(facts)]
    count = len(scores) if scores is not None else len(seeds)
    if seeds is not None and len(seeds) != count:
        raise InvalidArgument(f"{where}: {count} scores of {len(seeds)} seeds")
    runs = []
    for i in range(count):
        one = {**facts, "seed": i if seeds is None else seeds[i]}
        runs.append(_completed(one if scores is None else {**one, "score": float(scores[i])}))
    return runs


def _completed(facts: dict[str, Any]) -> dict[str, Any]:
    """With what the taxonomy says of a registered method."""
    method = facts.get("method")
    if method == "dense" or method in registry.names():
        known = taxonomy(method)
        for axis in ("when", "path"):
            value = getattr(known, axis)
            if value != "unknown":
                facts.setdefault(axis, value)
    return facts


def _recorded(folder: Path) -> dict[str, Any]:
    """The facts of a folder that a command wrote."""
    path = folder / "result.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: holds no finished run of train, tickets or prune ({path.name}: {error})"
        ) from None
    if "record" in found:
        facts = {k: v for k, v in found["record"].items() if v is not None and k in KEYS}
    elif isinstance(found.get("result"), dict) and "method" in found["result"]:
        facts = _pruned(found)
    else:
        raise DataError(f"{path}: not of train, tickets or prune, or of an older version")
    return _completed({"folder": str(folder), **facts})


def _pruned(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `sparseworks prune` wrote: no training, the start is the dense model."""
    result, options = found["result"], found.get("options", {})
    tensors = {t["name"]: 1 - t["sparsity"] for t in result["tensors"]}
    facts: dict[str, Any] = {
        "method": result["method"],
        "seed": options.get("seed", 0),
        "start": found["model"],
        "sparsity": result["sparsity"],
        "nominal_sparsity": options.get("sparsity"),
        "tensors": tensors,
        "left_dense": sorted(result["skipped"]),
        "parameters": found.get("parameters"),
        "epochs": 0, "steps": 0, "samples": 0, "training_macs": 0.0,
        "seconds": result["seconds"],
        "eval_data": options.get("eval_data"),
        "chosen_on": "nothing",
    }  # fmt: skip
    if found.get("metrics"):
        first = found["metrics"][0]
        facts |= {k: first[k] for k in ("unit", "higher_is_better")}
        facts |= {"metric": first["name"], "score": first["after"]}
    return {k: v for k, v in facts.items() if v is not None}


def _benched(path: Path) -> dict[str, Any]:
    """The latency that `sparseworks bench` measured, at the smallest batch."""
    try:
        rows = json.loads(path.read_text())["rows"]
        ours = [r for r in rows if r["candidate"] == "ours"] or rows
        first = min(ours, key=lambda r: r["batch"])
        return {"latency_ms": first["median_ms"], "latency_backend": first["candidate"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a bench.json ({error})") from None
