"""What sparse training costs per step: every hooked method against dense training in one run.

    python benchmarks/training.py [--rounds 24] [--model resnet20 llama] [--out FILE]

All that a hooked method adds happens in its hooks, so what is timed is the processor time spent in
them, against the dense step of the same process; differences of whole steps are smaller than what a
busy machine adds. All candidates take one step in turn, on the same batches. Masks change at every
`--every`-th step here; steps that change masks (and keep the dense gradient) are timed apart from
the others, and the overhead is that of a training in which they come every 100 steps:

    overhead = (other + (changing - other) / 100) / dense

One thread. Memory is the peak of a process of its own that trains a larger model for a few steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparseworks as sw
from sparseworks.core import registry
from sparseworks.core.errors import SparseworksError
from sparseworks.diagnostics.claims import machine
from sparseworks.models.calls import default_loss
from sparseworks.training.hooked import Periodic, Run

STEPS = 10_000  # of the schedule: only its first part is trained, so masks change all the time
AMORTIZED = 100


def resnet() -> tuple[nn.Module, Any]:
    from sparseworks.models.zoo import resnet20

    model = resnet20().to(memory_format=torch.channels_last)
    x = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return model, (x, torch.randint(0, 10, (128,)))


def llama() -> tuple[nn.Module, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=704, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 1024, (4, 128))}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {"resnet20": resnet, "llama": llama}


def hooked() -> list[str]:
    kinds = {n: registry.resolve(n).info.kind for n in registry.names()}
    return [n for n, kind in kinds.items() if kind == "hooked"]


_in_hooks = 0.0


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its processor time added up."""

    def call(*given: Any) -> Any:
        global _in_hooks
        start = time.process_time()
        try:
            return function(*given)
        finally:
            _in_hooks += time.process_time() - start

    return call


class TimedRun(Run):
    """A sparse run whose hooks are timed."""

    def _fresh_hook(self, name: str) -> Any:
        return timed(super()._fresh_hook(name))

    def _gradient_hook(self, name: str) -> Any:
        return timed(super()._gradient_hook(name))

    def _after_step(self, *given: Any) -> None:
        timed(super()._after_step)(*given)


class Candidate:
    """A model with its optimizer and its sparse run."""

    def __init__(self, model: nn.Module, method: str, every: int) -> None:
        self.model = model.train()
        self.every: int | None = None
        given: dict[str, Any] = {"sparsity": 0.9, "steps": STEPS}
        if method == "fixed":
            sw.prune(self.model, "magnitude", sparsity=0.9)
            given = {}
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, momentum=0.9)
        self.run = None
        if method != "dense":
            if isinstance(registry.build(method), Periodic):
                given["every"] = self.every = every
            module = sys.modules["sparseworks.training.sparsify"]  # the name is the function's
            with unittest.mock.patch.object(module, "Run", TimedRun):
                self.run = sw.sparsify(self.model, self.optimizer, method, **given)

    def step(self, batch: Any) -> tuple[float, float]:
        """One training step: processor seconds of the whole and of the hooks."""
        used, hooks = time.process_time(), _in_hooks
        self.optimizer.zero_grad()
        default_loss(self.model, batch).backward()
        self.optimizer.step()
        return time.process_time() - used, _in_hooks - hooks


def measure(name: str, rounds: int, every: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    candidates: dict[str, Candidate] = {}
    for method in ("dense", *hooked()):
        try:
            candidates[method] = Candidate(copy.deepcopy(model), method, every)
        except SparseworksError as error:
            print(f"  {method}: not for {name} ({error})")
    times: dict[str, list[tuple[float, float]]] = {m: [] for m in candidates}
    for _ in range(every):
        for candidate in candidates.values():
            candidate.step(batch)
    for _ in range(rounds):
        for method, candidate in candidates.items():
            times[method].append(candidate.step(batch))
    rows = []
    dense = statistics.median(whole for whole, _ in times["dense"])
    for method, candidate in candidates.items():
        hooks = [inside for _, inside in times[method]]
        moving = candidate.every is not None
        changing = hooks[every - 1 :: every] if moving else []
        others = [t for i, t in enumerate(hooks) if not moving or (i + 1) % every]
        other = statistics.median(others)
        change = statistics.median(changing) if changing else other
        held = [] if candidate.run is None else list(candidate.run.masks.values())
        held += [] if candidate.run is None else list(candidate.run.memory.values())
        rows.append({
            "model": name, "method": method, "dense_step_ms": dense * 1e3,
            "hooks_ms": other * 1e3, "hooks_ms_when_masks_change": change * 1e3,
            "overhead": (other + (change - other) / AMORTIZED) / dense,
            "overhead_when_masks_change": change / dense,
            "held_bytes_per_weight": sum(t.numel() * t.element_size() for t in held)
            / max(1, sum(p.numel() for p in candidate.run.parameters.values()))
            if candidate.run is not None else 0.0,
        })  # fmt: skip
        row = rows[-1]
        print(f"  {method:10s} hooks {row['hooks_ms']:6.2f} ms, changing masks "
              f"{row['hooks_ms_when_masks_change']:6.2f} ms, dense step {dense * 1e3:.1f} ms: "
              f"{row['overhead']:.2%}", flush=True)  # fmt: skip
    return rows


def peak(method: str) -> None:
    """Print the peak of this process over four steps of 25M weights in six layers, in MB."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(6)), nn.Linear(2048, 2))
    candidate = Candidate(model, method, every=2)
    for _ in range(4):
        candidate.step((torch.randn(8, 2048), torch.zeros(8, dtype=torch.int64)))
    size = sum(p.numel() * p.element_size() for p in candidate.model.parameters())
    print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, size / 2**20]))


def memory() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for method in ("dense", *hooked()):
        done = subprocess.run(
            [sys.executable, __file__, "--peak", method], capture_output=True, text=True
        )
        if done.returncode:
            print(f"  {method}: {done.stderr.strip().splitlines()[-1]}")
            continue
        high, size = json.loads(done.stdout.splitlines()[-1])
        over = high - rows[0]["peak_mb"] if rows else 0.0
        rows.append({"method": method, "peak_mb": high, "weights_mb": size, "over_dense_mb": over})
        print(f"  {method:12s} {high:7.0f} MB, {over:+5.0f} MB, weights {size:.0f} MB", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--model", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--peak", metavar="METHOD", help="only the peak memory of one method")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        peak(options.peak)
        return
    result: dict[str, Any] = {"machine": machine(), "steps": [], "memory": []}

    def write() -> None:
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    if not options.no_memory:  # first: a child counts the peak of the process it was forked from
        print("peak memory")
        result["memory"] = memory()
        write()
    for name in options.model:
        print(f"{name}: processor time, masks changing every {AMORTIZED} steps", flush=True)
        result["steps"] += measure(name, options.rounds, options.every)
        write()


if __name__ == "__main__":
    main()
