"""Copies of overloaded experts for a step, against other ways to spread experts, by arithmetic of a
cluster on drawn and on real traces of loads. That weights are those of data parallelism is a test
(four processes), not measured here. Numbers are of a model of costs, not of a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparseworks.diagnostics.byte_decoder import ByteText
from sparseworks.diagnostics.byte_mixtures import ByteMixture
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.experts.hecate_costs import Cluster, drifting_loads, simulate

EXPERTS, TOKENS = 32, 8192
CLUSTER = Cluster()  # 2 nodes of 4 devices
PLAN = {"overlap": 8, "slots": 2}


def routed(seed: int, steps: int) -> Tensor:
    """Loads of the first layer of a byte decoder with 32 experts without a balance loss, step by
    step from the start, scaled to as many tokens."""
    text = ByteText.novels(held=4096, batch=8)
    setup = ByteMixture(text, hidden=16)
    run = setup.mixture(
        "upcycling", seed, steps=steps, experts=EXPERTS, top_k=2, start="fresh", balance=0.0
    )
    layer = next(iter(run.layers.values()))
    found: list[Tensor] = []

    def look(step: int) -> None:
        found.append(layer.load.counts.double())
        run.reset()

    setup.fit(run, steps=steps, seed=seed, after=look)
    loads = torch.stack(found)
    return loads / loads.sum(1, keepdim=True) * TOKENS


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    steps = 400 if setting == "full" else 100
    traces = {
        f"zipf {z}": drifting_loads(
            EXPERTS, TOKENS, steps, z, torch.Generator().manual_seed(seed)
        )
        for z in (0.0, 1.0, 1.2, 1.4)
    }  # fmt: skip
    traces["routed"] = routed(seed, steps)
    found: dict[str, float] = {}
    faster: dict[str, float] = {}
    for name, loads in traces.items():
        ep = simulate(CLUSTER, loads, "ep")
        found[f"{name}: ep imbalance"] = ep.imbalance
        arms = {
            "rearranged": simulate(CLUSTER, loads, "rearrange"),
            "replicated": simulate(CLUSTER, loads, "replicate"),
            "fssdp": simulate(CLUSTER, loads, "fssdp", **PLAN),
            "resharded": simulate(CLUSTER, loads, "fssdp", **PLAN, resharded=True),
            "known loads": simulate(CLUSTER, loads, "fssdp", **PLAN, known=True),
        }
        for arm, cost in arms.items():
            found[f"{name}: {arm} speedup"] = ep.seconds / cost.seconds
            found[f"{name}: {arm} imbalance"] = cost.imbalance
        faster[name] = ep.seconds / arms["fssdp"].seconds
    slow = replace(CLUSTER, between=CLUSTER.between / 10, inside=CLUSTER.inside / 10)
    loads = traces["zipf 1.2"]
    found["slow links: speedup"] = (
        simulate(slow, loads, "ep").seconds / simulate(slow, loads, "fssdp", **PLAN).seconds
    )
    found["slow links, own t: speedup"] = (
        simulate(slow, loads, "ep").seconds / simulate(slow, loads, "fssdp").seconds
    )
    found["over ep"] = faster["zipf 1.2"] - 1.8
    found["over rearranged"] = faster["zipf 1.2"] - found["zipf 1.2: rearranged speedup"]
    found["even"] = 1.4 - found["zipf 1.2: fssdp imbalance"]
    found["more even"] = 1.25 - found["zipf 1.2: resharded imbalance"]
    found["nothing to gain"] = 1.02 - faster["zipf 0.0"]
    found["loss on slow links"] = 1 - found["slow links: speedup"]
    found["real loads"] = faster["routed"] - 1
    return found


CLAIM = Claim(
    card="177",
    method="hecate",
    title="copies of overloaded experts for a step are faster than experts at home",
    model="costs of 2 nodes of 4 devices, 32 experts, 2 slots for copies, 8 experts that hide "
    "behind other work",
    data="8,192 tokens in each of 100 steps (full: 400): Zipf loads whose ranks swap, and loads of "
    "a byte decoder's router from its first step",
    baseline="experts at home; homes chosen anew every 20 steps; all experts everywhere",
    metric="seconds of a step outside other work; largest over mean tokens of a device",
    promises=(
        Promise("over ep", "Zipf 1.2: at least 1.8 times as fast as experts at home"),
        Promise("over rearranged", "Zipf 1.2: not slower than new homes"),
        Promise("even", "Zipf 1.2: largest over mean at most 1.4"),
        Promise("more even", "Zipf 1.2: with new homes too at most 1.25"),
        Promise("nothing to gain", "uniform loads: at most 1.02 times as fast"),
        Promise("loss on slow links", "a tenth of the bandwidth under the same plan: slower"),
        Promise("real loads", "loads of a router: faster than experts at home"),
    ),
    measure=measure,
    looks=(3, 5, 8, 12, 20),
)
