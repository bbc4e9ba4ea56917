"""N:M training: what a step costs beside a dense one, and what 2:4 recovery reaches.

    python benchmarks/nm_training.py --part cost --out benchmarks/results/nm_training_cost.json
    python benchmarks/nm_training.py --part recovery --out benchmarks/results/nm_recovery.json

The cost is processor time of one training step (forward, backward, AdamW) of a linear layer, and
the part of it that is spent in the hooks of the method, each the least of several, every kind in
the same run; where steps are long, hooks tell the overhead better than a difference of steps on a
busy machine. The hooks of AST take the step of AdamW over. The recovery trains a 6M-parameter Llama
on novels (SPARSEWORKS_DATA) for a hundred steps at 2:4 and, with the same batches, densely.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparseworks as sw
from sparseworks.diagnostics.claims import data_root, machine
from sparseworks.io.atomic import atomic_file
from sparseworks.models.calls import default_loss
from sparseworks.training.distilling import Distillation
from sparseworks.training.planning import Sparse
from sparseworks.weights.semistructured.adaptive import AST
from sparseworks.weights.semistructured.cast import CAST

KINDS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "straight-through": {"method": "sr-ste", "decay": 0.0, "pattern": "2:4"},
    "sr-ste": {"method": "sr-ste", "pattern": "2:4"},
    "ast": {"method": "ast", "pattern": "2:4", "steps": 100},
    "bdwp": {"method": "bdwp", "pattern": "2:4"},
}


def cost(width: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step and of its hooks by kind, and the hooks in percent of a dense step."""
    x = torch.randn(tokens, width)
    steps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    hooks: dict[str, list[float]] = {kind: [] for kind in KINDS}
    made = {}
    spent = [0.0]

    def timed(hook: Any) -> Any:
        def run(*args: Any) -> Any:
            began = time.process_time()
            found = hook(*args)
            spent[0] += 1e3 * (time.process_time() - began)
            return found

        return run

    for kind, options in KINDS.items():
        torch.manual_seed(0)
        model = nn.Linear(width, width)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        if options is not None:
            sw.sparsify(model, optimizer, include="*", **options)
            for given in (
                optimizer._optimizer_step_pre_hooks,
                optimizer._optimizer_step_post_hooks,
            ):
                for key, hook in list(given.items()):
                    given[key] = timed(hook)
        made[kind] = model, optimizer
    for _ in range(repeats):  # in turn, so that a busy moment of the machine hits all kinds
        for kind, (model, optimizer) in made.items():
            spent[0], began = 0.0, time.process_time()
            optimizer.zero_grad()
            model(x.requires_grad_()).square().mean().backward()
            optimizer.step()
            steps[kind].append(1e3 * (time.process_time() - began))
            hooks[kind].append(spent[0])
    least = {kind: min(taken) for kind, taken in steps.items()}
    added = {kind: min(taken) for kind, taken in hooks.items()}
    share = {kind: 100 * t / least["dense"] for kind, t in added.items()}
    return {"width": width, "tokens": tokens, "step_ms": least, "hook_ms": added,
            "hooks_percent": share}  # fmt: skip


KL = {"task": 1 / 3, "kl": 2 / 3, "temperature": 2.0}
RULE = ((1 + 0.9) / (1 - 0.9)) ** -0.5  # how much longer the steps of AST's rule are than Adam's
# method and options, weights of the distillation, share of the learning rate
ARMS: dict[str, tuple[dict[str, Any] | None, dict[str, float], float]] = {
    "dense": (None, {}, 1.0),
    "straight-through": ({"method": "sr-ste", "decay": 0.0}, {}, 1.0),
    "sr-ste": ({"method": "sr-ste", "decay": 1e-2}, {}, 1.0),
    "ast": ({"method": "ast", "decay": 1e-2}, dict(AST.recovery), RULE),
    "squarehead": ({"method": "squarehead"}, {"task": 1 / 3, "kl": 2 / 3, "squarehead": 1.0}, 1.0),
    "dense, distilled": (None, KL, 1.0),
    "straight-through, distilled": ({"method": "sr-ste", "decay": 0.0}, KL, 1.0),
    "cast": ({"method": "cast", "decay": 1e-2}, dict(CAST.recovery), RULE),
}


def recovery(steps: int, lr: float, windows: int, seed: int, out: Path, arms: list[str]) -> Any:
    """Perplexity of the novel that was held out, after the same steps of every arm."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparseworks.data import load
    from sparseworks.data.text import read_text, token_ids
    from sparseworks.diagnostics.metrics import perplexity

    root = data_root()
    folder = root / "models" / "novel-llama-6m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    ids = token_ids(read_text(root / "text" / "novels-train.txt")[:2_000_000], tokenizer)
    metric = perplexity(load(root / "text" / "novels-valid.txt", tokenizer=tokenizer,
                             split="evaluation", samples=windows))  # fmt: skip
    one_shot = copy.deepcopy(base)
    sw.prune(one_shot, "magnitude", pattern="2:4")
    found: dict[str, Any] = {"steps": steps, "lr": lr, "tokens": 2 * 128, "seed": seed,
                             "before": metric(base), "one-shot magnitude": metric(one_shot),
                             "perplexity": {}, "machine": machine()}  # fmt: skip
    for arm in arms:
        settings, weights, share = ARMS[arm]
        model = copy.deepcopy(base)
        if arm == "squarehead":
            sw.prune(model, "sparsegpt", pattern="2:4", data=load(
                root / "text" / "novels-train.txt", tokenizer=tokenizer, samples=32, seed=seed
            ))  # fmt: skip
            found["one-shot sparsegpt"] = metric(model)
        loss: Any = Distillation.of(weights, base) if weights else default_loss

        def build(parameters: Any, share: float = share) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr * share, (0.9, 0.95), weight_decay=0.0)

        run: Any = None
        if settings is None:
            optimizer = build(model.parameters())
        else:
            given = dict(settings) if arm == "squarehead" else {"pattern": "2:4", **settings}
            run, optimizer = Sparse(given.pop("method"), settings=given).begin(model, steps, build)
        generator = torch.Generator().manual_seed(seed)
        model.train()
        for step in range(steps):
            rate = min(1.0, 20 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = lr * share * max(0.01, rate)
            first = torch.randint(0, len(ids) - 128, (2,), generator=generator)
            optimizer.zero_grad()
            loss(model, {"input_ids": ids[first[:, None] + torch.arange(128)]}).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if run is not None:
            run.finish()
        found["perplexity"][arm] = metric(model)
        print(arm, found["perplexity"][arm], flush=True)
        write(out, found)
    return found


def write(out: Path, value: Any) -> None:
    with atomic_file(out) as file:
        file.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("cost", "recovery"), default="cost")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS)[:5])
    given = parser.parse_args()
    if given.part == "cost":
        rows = [cost(given.width, tokens, given.repeats) for tokens in given.tokens]
        write(given.out, {"rows": rows, "machine": machine()})
        print(json.dumps(rows, indent=1))
    else:
        recovery(given.steps, given.lr, given.windows, given.seed, given.out, given.arms)


if __name__ == "__main__":
    main()
