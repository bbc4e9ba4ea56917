"""Sparse from scratch at 90 % with equal epochs: SET, RigL, GraNet, static masks, dense, paired.

    python benchmarks/scratch.py [--folder runs/scratch] [--out FILE]    any number of times
    python benchmarks/scratch.py --size 32 --images 50000 --epochs 30    the long way

ResNet-20 on a random part of CIFAR-10's training images, by default at half the resolution. All
methods of a seed start from the same weights and see the same batches; every finished run is a file
in the folder, so that a killed benchmark goes on where it was. Accuracy is of all 10,000 test
images at the end; nothing is chosen on it. Products are in bfloat16, weights in fp32, one thread.

Training FLOPs are counted as the papers do: 3 f for a step, f the forward pass at the densities of
that step; a step that needs the dense gradient costs 2 f + f_dense (Evci et al. 2020, appendix H).
Churn is the share of kept weights that a mask update replaces, averaged over the updates; explored
the share of all weights that was kept at any time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparseworks as sw
from sparseworks.diagnostics.claims import machine
from sparseworks.diagnostics.statistics import paired_interval
from sparseworks.diagnostics.subjects import image_subject
from sparseworks.io.atomic import atomic_file
from sparseworks.models.views import find_prunable
from sparseworks.models.zoo import resnet20
from sparseworks.training.fitting import Recipe, fit_classifier
from sparseworks.training.hooked import Run
from sparseworks.training.runs import digest_of
from sparseworks.training.watching import Trace
from sparseworks.weights.dynamic.isoflop import layer_macs, model_macs

SPARSITY, UPDATES = 0.9, 40
METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "dense": None,
    "static ERK": ("static", {"budget": "erk"}),
    "static uniform": ("static", {"budget": "uniform"}),
    "SET": ("set", {"budget": "erk"}),
    "RigL": ("rigl", {"budget": "erk"}),
    "GraNet": ("granet", {}),
}


class Cost:
    """Forward multiply-adds of an image at the densities of the moment."""

    def __init__(self, model: nn.Module, size: int) -> None:
        example = torch.zeros(1, 3, size, size)
        self.layers = layer_macs(model, find_prunable(model, include="*"), example)
        self.dense = model_macs(model, example)

    def forward(self, run: Run | None) -> float:
        if run is None:
            return self.dense
        return self.dense - sum(
            self.layers[n] * (1 - float(m.float().mean())) for n, m in run.masks.items()
        )


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: its row of the table."""
    images, metric = image_subject(seed, options.images, size=options.size, held=10_000)
    torch.manual_seed(seed)
    model = resnet20().to(memory_format=torch.channels_last)
    cost = Cost(model, options.size)
    recipe = Recipe(epochs=options.epochs, batch_size=options.batch_size)
    run: Run | None = None
    trace: Trace | None = None
    macs, forward = 0.0, cost.forward(None)

    def start(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Run | None:
        nonlocal run, trace, forward
        chosen = METHODS[name]
        if chosen is None:
            return None
        method, more = chosen
        every = max(1, steps // UPDATES)
        if method != "static":
            more = {**more, "every": every}
        run = sw.sparsify(
            net, optimizer, method, sparsity=SPARSITY, steps=steps, seed=seed, include="*", **more
        )
        trace, forward = Trace(run, every), cost.forward(run)
        wanted = run.method.wants_dense_gradients
        run_now = run

        def told(*_: Any) -> None:  # before the step counts: did it need the dense gradient?
            nonlocal macs
            macs += 3 * forward + (cost.dense - forward if wanted(run_now) else 0)

        optimizer.register_step_pre_hook(told)
        return run

    def progress(step: int, steps: int, what: str) -> None:
        nonlocal forward, macs
        if run is None:
            macs += 3 * forward
        elif trace is not None and trace.look(step) is not None:
            forward = cost.forward(run)

    began = time.process_time()
    # the cache of cast weights would outlive the optimizer's steps
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        fit_classifier(model, images, recipe, start=start, seed=seed, progress=progress)
    seconds = time.process_time() - began
    rows = [] if trace is None else [r for r in trace.rows if r["churn"] > 0]
    record = sw.masks(model)
    return {
        "method": name, "seed": seed, "accuracy": metric(model),
        "sparsity": 0.0 if record is None else record.sparsity(),
        "training_flops": 2 * macs * options.batch_size, "cpu_seconds": seconds,
        "churn": sum(r["churn"] for r in rows) / max(1, len(rows)),
        "explored": 1.0 if trace is None else trace.rows[-1]["explored"],
        "forward_share": forward / cost.dense,
    }  # fmt: skip


def table(found: dict[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per method over its seeds, with paired differences in points."""
    rows = []
    for name in METHODS:
        mine = {s: r for (n, s), r in found.items() if n == name}
        if not mine:
            continue
        row: dict[str, Any] = {"method": name, "seeds": sorted(mine)}
        for key in ("accuracy", "training_flops", "cpu_seconds", "churn", "explored"):
            row[key] = sum(r[key] for r in mine.values()) / len(mine)
        for other in ("static ERK", "dense"):
            both = [s for s in mine if (other, s) in found]
            if other != name and len(both) > 1:
                gap = paired_interval(
                    [mine[s]["accuracy"] - found[other, s]["accuracy"] for s in both]
                )
                row[f"against {other}"] = [gap.mean, gap.low, gap.high]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/scratch"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=16, help="pixels a side: 16 or 32")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--runs", type=int, help="only so many new ones")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    setting = {k: getattr(options, k) for k in ("size", "images", "epochs", "batch_size")}
    setting |= {"sparsity": SPARSITY, "updates": UPDATES}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    made = 0
    for seed in range(options.seeds):
        for name in METHODS:
            path = options.folder / f"{digest_of({**setting, 'method': name, 'seed': seed})}.json"
            if not path.is_file():
                if made == options.runs:
                    continue
                with atomic_file(path) as part:
                    part.write_text(json.dumps(train(name, seed, options), indent=1) + "\n")
                made += 1
            found[name, seed] = json.loads(path.read_text())
            row = found[name, seed]
            print(f"{name:15s} seed {seed} {row['accuracy']:.2f} %, {row['cpu_seconds']:.0f} s",
                  flush=True)  # fmt: skip
    result = {"machine": machine(), "setting": setting, "table": table(found),
              "runs": list(found.values())}  # fmt: skip
    for row in result["table"]:
        print(json.dumps(row))
    if options.out:
        with atomic_file(options.out) as part:
            part.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
