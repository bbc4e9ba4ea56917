"""Seconds to prune one 4096 x 4096 layer: ours against the papers' algorithms in plain torch.

    python benchmarks/oneshot.py [--size 4096] [--repeat 3] [--out benchmarks/results/oneshot.json]

SparseGPT is given its Hessian (factorisation included), Wanda its norms. The peers are the papers'
own procedures, written straight down; both run in the same process, in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparseworks.core.patterns import Unstructured, parse_pattern
from sparseworks.weights.oneshot.obs import column_solve, prepare_hessian, upper_factor


def plain_sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float, prune_m: int = 0) -> Tensor:
    """The paper's blocked algorithm: Cholesky, inverse, Cholesky; column loop; lazy batches."""
    w, h = weight.clone(), hessian.clone()
    dead = torch.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    index = torch.arange(w.shape[1])
    h[index, index] += 0.01 * torch.mean(torch.diag(h))
    h = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(h, upper=True)
    for i1 in range(0, w.shape[1], 128):
        i2 = min(i1 + 128, w.shape[1])
        w1 = w[:, i1:i2].clone()
        q1, e1, u1 = torch.zeros_like(w1), torch.zeros_like(w1), u[i1:i2, i1:i2]
        if prune_m == 0:
            score = w1**2 / torch.diag(u1).reshape(1, -1) ** 2
            threshold = torch.sort(score.flatten())[0][int(score.numel() * sparsity)]
            mask = score <= threshold
        else:
            mask = torch.zeros_like(w1, dtype=torch.bool)
        for i in range(i2 - i1):
            column, d = w1[:, i], u1[i, i]
            if prune_m and i % prune_m == 0:
                score = w1[:, i : i + prune_m] ** 2 / torch.diag(u1)[i : i + prune_m] ** 2
                worst = torch.topk(score, prune_m // 2, dim=1, largest=False)[1]
                mask.scatter_(1, i + worst, True)
            q = column.clone()
            q[mask[:, i]] = 0
            q1[:, i] = q
            error = (column - q) / d
            w1[:, i:] -= error.unsqueeze(1).matmul(u1[i, i:].unsqueeze(0))
            e1[:, i] = error
        w[:, i1:i2] = q1
        w[:, i2:] -= e1.matmul(u[i1:i2, i2:])
    return w


def ours_sparsegpt(weight: Tensor, hessian: Tensor, pattern: str, sparsity: float) -> Tensor:
    legal = parse_pattern(pattern)
    damped, dead = prepare_hessian(hessian, 0.01)
    keep = legal.keep(weight.shape, sparsity)
    alive = torch.where(dead[None, :], 0.0, weight)
    return column_solve(alive, upper_factor(damped), legal, keep)[0]


def ours_wanda(weight: Tensor, norm: Tensor) -> Tensor:
    pattern = Unstructured("row")
    scores = weight.abs() * norm
    return torch.where(pattern.select(scores, pattern.keep(weight.shape, 0.5)), weight, 0.0)


def plain_wanda(weight: Tensor, norm: Tensor) -> Tensor:
    scores = weight.abs() * norm
    order = torch.sort(scores, dim=-1, stable=True)[1][:, : weight.shape[1] // 2]
    mask = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)
    return weight.masked_fill(mask, 0.0)


def seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    n = options.size
    torch.manual_seed(0)
    weight = torch.randn(n, n)
    x = torch.randn(2 * n, n) @ (torch.eye(n) + 0.3 * torch.randn(n, n) / n**0.5)
    hessian, norm = x.t() @ x * (2 / 128), x.norm(dim=0)
    cases = {
        "sparsegpt 50%": (
            lambda: ours_sparsegpt(weight, hessian, "unstructured", 0.5),
            lambda: plain_sparsegpt(weight, hessian, 0.5),
        ),
        "sparsegpt 2:4": (
            lambda: ours_sparsegpt(weight, hessian, "2:4", 0.5),
            lambda: plain_sparsegpt(weight, hessian, 0.5, 4),
        ),
        "wanda 50%": (lambda: ours_wanda(weight, norm), lambda: plain_wanda(weight, norm)),
    }
    rows = {}
    for name, (ours, plain) in cases.items():
        pairs = [(seconds(ours), seconds(plain)) for _ in range(options.repeat)]
        mine = statistics.median(p[0] for p in pairs)
        theirs = statistics.median(p[1] for p in pairs)
        rows[name] = {"ours_s": mine, "plain_s": theirs, "ratio": theirs / mine, "runs": pairs}
        print(f"{name:16s} ours {mine:7.2f} s   plain {theirs:7.2f} s   {theirs / mine:.2f}x")
    if options.out:
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        machine["threads"] = str(torch.get_num_threads())
        text = json.dumps({"size": n, "machine": machine, "rows": rows}, indent=1)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
