"""Claims: a paper's central promise in miniature, declared, run, recorded, and judged.

A claim file `claims/<room>/<NNN>_<name>.py` defines `CLAIM = Claim(...)`. Running it writes
`<NNN>_<name>.json` beside it. Finished seeds are kept in a runs folder under a hash of the claim's
description and setting, so an interrupted claim goes on and nothing is computed twice.

A promise is a number per seed, oriented so that the paper promises it to be positive (a difference
of paired runs, say). Its verdict: *holds* when the 95 % interval over seeds lies above 0, *fails*
when it lies below 0 or below what was declared negligible, *inconclusive* otherwise. A claim may
fix looks beforehand: it stops at the first at which every promise is decided, and the intervals are
widened for the looks (`sparseworks.diagnostics.judging`). The margin proposed for the miniature is
reported beside the verdict and does not decide.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.diagnostics.judging import judge
from sparseworks.diagnostics.machines import machine
from sparseworks.diagnostics.sweeping import Cluster, sweep
from sparseworks.io.atomic import atomic_file

__all__ = [
    "Claim", "Cluster", "Promise", "data_root", "find_claims", "load_claim", "machine", "results",
    "run", "table",
]  # fmt: skip

Setting = Literal["quick", "full"]
_SHIPPED = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Promise:
    """One inequality.

    Args:
        name: key in what `measure` returns: a number that is positive when the promise holds.
        statement: the inequality in words.
        margin: the size proposed for the miniature, in the unit of the number; None: none.
        exact: the number has no randomness (a count, an identity); one value refutes it.
        negligible: the effect, fixed beforehand, below which there is none to speak of; an interval
            that lies below it fails the promise though it contains 0.
    """

    name: str
    statement: str
    margin: float | None = None
    exact: bool = False
    negligible: float | None = None


@dataclass(frozen=True)
class Claim:
    """An experiment.

    Args:
        card: number of the method card.
        method: registered name.
        title: what is claimed, in one line.
        model: what is pruned.
        data: what it is calibrated, trained and tested on.
        baseline: what it is compared with.
        metric: what is measured.
        promises: the inequalities.
        measure: `(seed, setting) -> {name: number}`; beside the promises, any figures to record.
        seeds: run by default.
        looks: instead of `seeds`: numbers of seeds after which the promises are judged, LOOKS say;
            it stops when all are decided.
        version: raise it when `measure` changes, so that old seeds are not reused and results of an
            earlier version are told from those of this one.
    """

    card: str
    method: str
    title: str
    model: str
    data: str
    baseline: str
    metric: str
    promises: tuple[Promise, ...]
    measure: Callable[[int, Setting], Mapping[str, float]] = field(compare=False, repr=False)
    seeds: tuple[int, ...] = (0, 1, 2)
    looks: tuple[int, ...] = ()
    version: int = 1

    @property
    def planned(self) -> tuple[int, ...]:
        """The seeds that a run may take."""
        return tuple(range(self.looks[-1])) if self.looks else self.seeds

    def digest(self, setting: Setting) -> str:
        """Hash of the description, the folder of its runs; how it is judged is no part of it."""
        judged = ("measure", "seeds", "looks")
        described = {k: v for k, v in asdict(self).items() if k not in judged}
        for promise in described["promises"]:
            del promise["negligible"]
        text = json.dumps({**described, "setting": setting}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def data_root() -> Path:
    """The folder of the shared data: SPARSEWORKS_DATA, or ../shared/data from the checkout.

    Raises:
        DataError: it is not there.
    """
    given = os.environ.get("SPARSEWORKS_DATA")
    root = Path(given) if given else Path.cwd().parent / "shared" / "data"
    if not root.is_dir():
        raise DataError(f"no data at {root}; set SPARSEWORKS_DATA to the folder of the test data")
    return root


def find_claims(folder: str | os.PathLike[str] = "claims") -> dict[str, Path]:
    """Card number -> claim file, sorted.

    Raises:
        InvalidArgument: there is no folder of claims here.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InvalidArgument(
            f"no folder {root} here: claims run from a checkout of the project (or give --folder)"
        )
    files = sorted(root.glob("*/[0-9a]??_*.py"), key=lambda p: p.name)
    return {p.name[:3]: p for p in files}


def load_claim(path: Path) -> Claim:
    """The CLAIM of a file."""
    spec = importlib.util.spec_from_file_location(f"claim_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    claim = getattr(module, "CLAIM", None)
    if not isinstance(claim, Claim):
        raise InvalidArgument(f"{path}: defines no CLAIM = Claim(...)")
    return claim


class _Measure:
    """A claim that measures its seeds."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self.claim, self.setting = load_claim(path), setting

    def __call__(self, seed: int) -> dict[str, Any]:
        began, worked = time.perf_counter(), time.process_time()
        values = {k: float(v) for k, v in self.claim.measure(seed, self.setting).items()}
        return {
            "values": values,
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - worked,  # what it costs on a shared machine
        }


def run(
    path: Path,
    *,
    setting: Setting = "quick",
    seeds: tuple[int, ...] | None = None,
    runs: str | os.PathLike[str] = "runs/claims",
    cluster: Cluster | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure every seed that is not on disk yet, judge, and write the result beside the claim.

    Seeds that are given are judged together, without looks. Over a cluster the seeds up to the next
    look are measured at once; the result is the same.
    """
    claim = load_claim(path)
    chosen = claim.planned if seeds is None else seeds
    looks = claim.looks if seeds is None else ()
    folder = Path(runs) / f"{path.stem}-{claim.digest(setting)}"
    measured: dict[int, dict[str, Any]] = {}
    for start, end in pairwise((0, *looks) if looks else (0, len(chosen))):
        begun = len(measured)

        def told(done: int, _: int, seed: str, begun: int = begun) -> None:
            if progress is not None:
                progress(begun + done, len(chosen), f"{claim.card} seed {seed}")

        measured |= {
            int(seed): found for seed, found in sweep(
                partial(_Measure, path.resolve(), setting),
                {str(seed): (seed,) for seed in chosen[start:end]},
                folder=folder, cluster=cluster, progress=told,
            ).items()
        }  # fmt: skip
        if end in looks[:-1] and _decided(claim, looks, measured):
            break
    result = _judge(claim, setting, looks, measured)
    _write(path.with_suffix(".json"), result)
    return result


def _verdicts(
    claim: Claim, looks: tuple[int, ...], measured: Mapping[int, Any]
) -> list[dict[str, Any]]:
    verdicts = []
    for promise in claim.promises:
        values = [m["values"][promise.name] for m in measured.values()]
        found = judge(values, looks=looks, exact=promise.exact, negligible=promise.negligible)
        verdicts.append(
            {
                "name": promise.name,
                "statement": promise.statement,
                "mean": found.mean,
                "interval": [found.low, found.high] if math.isfinite(found.low) else None,
                "seeds": found.seeds,
                "proposed_margin": promise.margin,
                "negligible": promise.negligible,
                "reaches_margin": promise.margin is None or found.mean >= promise.margin,
                "verdict": found.verdict,
            }
        )
    return verdicts


def _decided(claim: Claim, looks: tuple[int, ...], measured: Mapping[int, Any]) -> bool:
    return all(v["verdict"] != "inconclusive" for v in _verdicts(claim, looks, measured))


def _judge(
    claim: Claim, setting: Setting, looks: tuple[int, ...], measured: Mapping[int, Any]
) -> dict[str, Any]:
    verdicts = _verdicts(claim, looks, measured)
    overall = {v["verdict"] for v in verdicts}
    spent = [m.get("cpu_seconds") for m in measured.values()]  # older records lack it
    return {
        "card": claim.card,
        "method": claim.method,
        "title": claim.title,
        "verdict": overall.pop() if len(overall) == 1 else "mixed",
        "model": claim.model,
        "data": claim.data,
        "baseline": claim.baseline,
        "metric": claim.metric,
        "setting": setting,
        "version": claim.version,
        "looks": list(looks),
        "promises": verdicts,
        "seeds": {str(s): m["values"] for s, m in measured.items()},
        "seconds": sum(m["seconds"] for m in measured.values()),
        "cpu_seconds": None if None in spent else sum(spent),
        "machine": machine(),
    }


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write_text(json.dumps(value, indent=1) + "\n")


def results(folder: str | os.PathLike[str] = "claims") -> list[dict[str, Any]]:
    """The recorded results, by card: of this checkout, else those that came with the package."""
    if Path(folder).is_dir():
        recorded = [p.with_suffix(".json") for p in find_claims(folder).values()]
        return [json.loads(p.read_text()) for p in recorded if p.is_file()]
    shipped: list[dict[str, Any]] = json.loads(_SHIPPED.read_text())
    return shipped


def table(folder: str | os.PathLike[str] = "claims") -> str:
    """A Markdown table of all recorded results, for the documentation."""
    lines = [
        "| card | method | promise | mean | interval | proposed | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results(folder):
        for p in result["promises"]:
            interval = p["interval"]
            shown = f"{interval[0]:.3g} to {interval[1]:.3g}" if interval else "one value"
            margin = "" if p["proposed_margin"] is None else f"{p['proposed_margin']:g}"
            lines.append(
                f"| {result['card']} | {result['method']} | {p['statement']} | {p['mean']:.3g} "
                f"| {shown} | {margin} | **{p['verdict']}** |"
            )
    return "\n".join(lines) + "\n"
