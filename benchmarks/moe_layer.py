"""A layer of experts beside dense products of the same FLOPs, forward and backward, on CPUs.

The peers do what the active experts do on as many rows as there are (token, expert) pairs, with one
matrix for all of them: `products`, the bare matrix products; `dense`, a gated MLP, which has
its activations too; `transformers`, the layer of Mixtral in Hugging Face transformers. Time of the
processor is recorded beside that of the clock, for machines that others use as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from sparseworks.diagnostics.claims import machine
from sparseworks.experts.banks import Experts
from sparseworks.experts.layers import MoE
from sparseworks.experts.routers import TopK
from sparseworks.io.atomic import atomic_file


def arms(given: argparse.Namespace) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    t, d, e, n, k = given.tokens, given.width, given.hidden, given.experts, given.top_k
    layer = MoE(TopK(n, d, k), Experts(n, d, e))
    with torch.no_grad():
        layer.gate.weight.normal_()
    x, g = torch.randn(t, d, requires_grad=True), torch.randn(t, d)
    rows, inner = torch.randn(t * k, d, requires_grad=True), torch.randn(t * k, e)
    inner.requires_grad_()
    w1, w2 = torch.randn(2 * e, d, requires_grad=True), torch.randn(d, e, requires_grad=True)
    g1, g2 = torch.randn(t * k, 2 * e), torch.randn(t * k, d)

    def clear() -> None:
        for p in (x, rows, inner, w1, w2, *layer.parameters(), *theirs.parameters()):
            p.grad = None

    def products() -> None:
        torch.autograd.backward(rows @ w1.T, g1)
        torch.autograd.backward(inner @ w2.T, g2)

    def dense() -> None:
        gate, up = (rows @ w1.T).chunk(2, -1)
        torch.autograd.backward((F.silu(gate) * up) @ w2.T, g2)

    def moe() -> None:
        torch.autograd.backward(layer(x), g)

    theirs = peer(layer, k)

    def transformers() -> None:
        torch.autograd.backward(theirs(x[None])[0], g)

    torch.testing.assert_close(theirs(x[None])[0], layer(x), rtol=1e-4, atol=1e-4)
    made = {"products": products, "dense": dense, "moe": moe, "transformers": transformers}
    return {name: lambda f=f: (clear(), f())[1] for name, f in made.items()}  # type: ignore[misc]


def peer(layer: MoE, k: int) -> Any:
    """Mixtral's layer with the same weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    bank = layer.experts
    config = MixtralConfig(
        hidden_size=bank.width, intermediate_size=bank.hidden, num_local_experts=bank.count,
        num_experts_per_tok=k,
    )  # fmt: skip
    made = MixtralSparseMoeBlock(config)
    made.load_state_dict(layer.state_dict())
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in {"tokens": 4096, "width": 512, "hidden": 1408, "experts": 8, "top-k": 2,
                        "threads": 2, "repeats": 7}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found: dict[str, list[tuple[float, float]]] = {}
    made = arms(given)
    for repeat in range(given.repeats + 1):  # in turn, so that a busy moment hits all of them
        for name, run in made.items():
            began = time.perf_counter(), time.process_time()
            run()
            spent = time.perf_counter() - began[0], time.process_time() - began[1]
            if repeat:
                found.setdefault(name, []).append((1e3 * spent[0], 1e3 * spent[1]))

    def over(peer: str, clock: int) -> dict[str, float]:
        """The layer's time in that of a peer: of the least of each, and median over the turns."""
        ours, theirs = ([x[clock] for x in found[n]] for n in ("moe", peer))
        return {
            "least": min(ours) / min(theirs),
            "median": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        }

    peers = [n for n in made if n != "moe"]
    flops = 3 * 6 * given.tokens * given.top_k * given.width * given.hidden
    value = {
        "setting": {k: v for k, v in vars(given).items() if k != "out"},
        "gflop": flops / 1e9,
        "wall_ms": {n: min(x[0] for x in v) for n, v in found.items()},
        "cpu_ms": {n: min(x[1] for x in v) for n, v in found.items()},
        "moe_over": {p: {"wall": over(p, 0), "cpu": over(p, 1)} for p in peers},
        "machine": machine(),
    }
    with atomic_file(given.out) as file:
        file.write_text(json.dumps(value, indent=1) + "\n")
    print(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
