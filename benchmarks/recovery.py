"""2:4 of a small Llama: how near training brings it to the dense model that trained as long.

    python benchmarks/recovery.py [--steps 100] [--seeds 3] [--arms NAME ...] [--out FILE]

The Llama and the novels of SPARSEWORKS_DATA. Every arm, the dense one too, takes the same steps
over the same windows by AdamW, its learning rate from one grid: the one of least loss on the last
part of the training text, which no arm trains on, in a run of a seed that is not used again. Then
seeds 0, 1, ... train with it, and the perplexity on the validation text is told: 240,000
characters, windows of 256 tokens. Finished runs stay in --out, and a call goes on with it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

import sparseworks as sw
from sparseworks.cli.loading import load_model
from sparseworks.data.epochs import TextEpochs
from sparseworks.data.text import read_text, token_ids, windows
from sparseworks.diagnostics.claims import data_root, machine
from sparseworks.io.atomic import atomic_file
from sparseworks.models.calls import default_loss
from sparseworks.training.distilling import Distillation
from sparseworks.training.loop import Training
from sparseworks.training.planning import Plan, Sparse
from sparseworks.weights.semistructured.adaptive import AST

RATES = (1e-4, 3e-4)
CHOOSING = 1000  # the seed of the runs that choose a rate
LENGTH, BATCH = 128, 8
# arm: (pruned by, training method, its options, learns from the dense model too)
ARMS: dict[str, tuple[str | None, str | None, dict[str, Any], bool]] = {
    "dense": (None, None, {}, False),
    "magnitude, fixed": ("magnitude", "fixed", {}, False),
    "sparsegpt, fixed": ("sparsegpt", "fixed", {}, False),
    "sparsegpt, fixed, distilled": ("sparsegpt", "fixed", {}, True),
    "plain straight-through": (None, "sr-ste", {"decay": 0.0}, False),
    "sr-ste": (None, "sr-ste", {"decay": 1e-2}, False),
    "ast": (None, "ast", {"decay": 1e-2}, False),
    "ast, distilled": (None, "ast", {"decay": 1e-2}, True),
    "sparsegpt, ast, distilled": ("sparsegpt", "ast", {"decay": 1e-2}, True),
}


class Bench:
    """The model, its texts, and the runs that are there."""

    def __init__(self, steps: int, out: Path | None) -> None:
        self.loaded = load_model(str(data_root() / "models" / "novel-llama-6m"))
        self.steps, self.out = steps, out
        tokenizer = self.loaded.tokenizer
        text = read_text(data_root() / "text" / "novels-train.txt")
        cut = len(text) - 240_000
        self.train = token_ids(text[:cut], tokenizer)
        self.held = windows(token_ids(text[cut:], tokenizer), length=256)[:10]
        valid = read_text(data_root() / "text" / "novels-valid.txt")[:240_000]
        self.valid = windows(token_ids(valid, tokenizer), length=256)
        self.runs: dict[str, Any] = {}
        if out is not None and out.is_file():
            self.runs = json.loads(out.read_text())["runs"]

    def loss(self, model: Any, batches: list[Any]) -> float:
        with torch.no_grad():
            found = [float(default_loss(model.eval(), b)) for b in batches]
        sizes = [len(b["input_ids"]) for b in batches]
        return sum(x * n for x, n in zip(found, sizes)) / sum(sizes)

    def run(self, arm: str, rate: float, seed: int) -> dict[str, float]:
        key = f"{arm} | {rate:g} | {seed}"
        if key not in self.runs:
            self.runs[key] = self._run(arm, rate, seed)
            print(key, self.runs[key], flush=True)
            self.save()
        found: dict[str, float] = self.runs[key]
        return found

    def _run(self, arm: str, rate: float, seed: int) -> dict[str, float]:
        pruner, method, options, distilled = ARMS[arm]
        model = copy.deepcopy(self.loaded.model)
        epochs = TextEpochs(self.train, LENGTH, BATCH, seed)
        if pruner is not None:
            few = TextEpochs(self.train, 256, 8, seed).epoch(0)
            data = None if pruner == "magnitude" else list(itertools.islice(few, 8))
            sw.prune(model, pruner, pattern="2:4", data=data)
        sparse = None
        if method is not None:
            given = options if method == "fixed" else {"pattern": "2:4", **options}
            sparse = Sparse(method, settings={**given, "seed": seed})
        loss = Distillation.of(AST.recovery, self.loaded.model) if distilled else None
        plan = Plan(epochs=1, batch_size=BATCH, lr=rate, optimizer="adamw", weight_decay=0.01,
                    warmup=0.1, clip=1.0, seed=seed)  # fmt: skip
        training = Training(model, plan, _Some(epochs, self.steps), sparse=sparse, loss=loss)
        training.fit()
        zeros = 0.0
        if training.run is not None:
            zeros = training.run.finish().sparsity()
        if seed == CHOOSING:
            return {"held": self.loss(model, self.held), "zeros": zeros}
        return {"perplexity": math.exp(self.loss(model, self.valid)), "zeros": zeros}

    def save(self) -> None:
        if self.out is not None:
            with atomic_file(self.out) as file:
                file.write_text(json.dumps(self.told(), indent=1) + "\n")

    def told(self) -> dict[str, Any]:
        return {"model": "novel-llama-6m", "steps": self.steps, "tokens_a_step": LENGTH * BATCH,
                "rates": RATES, "machine": machine(), "runs": self.runs}  # fmt: skip


class _Some:
    """The first batches of an epoch, as one epoch."""

    def __init__(self, epochs: TextEpochs, steps: int) -> None:
        self.epochs, self.steps = epochs, steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, number: int) -> Any:
        every = itertools.chain.from_iterable(self.epochs.epoch(n) for n in itertools.count(number))
        return itertools.islice(every, self.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench(options.steps, options.out)
    start = math.exp(bench.loss(bench.loaded.model, bench.valid))
    print(f"before: {start:.2f}")
    rows = []
    for arm in options.arms:
        rate = min(options.rates, key=lambda r: bench.run(arm, r, CHOOSING)["held"])
        found = [bench.run(arm, rate, seed)["perplexity"] for seed in range(options.seeds)]
        rows.append((arm, rate, found))
    dense = next((f for a, _, f in rows if a == "dense"), None)
    for arm, rate, found in rows:
        mean = statistics.mean(found)
        over = "" if dense is None else f"  {mean / statistics.mean(dense) - 1:+.1%}"
        print(f"{arm:28} lr {rate:g}  {mean:.2f} ({', '.join(f'{x:.2f}' for x in found)}){over}")


if __name__ == "__main__":
    main()
