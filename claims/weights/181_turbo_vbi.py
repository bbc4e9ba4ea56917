"""A Markov support against independent supports: regression, and a digits network.

The regression has the posterior of its weights in closed form, so that only the support differs.
The networks are compared at one density, each fine-tuned with its masks fixed, beside magnitude
pruning with the same number of steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.masks import Masks
from sparseworks.data.images import digits
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.weights.dynamic.turbo_vbi import Hyper, chain_messages, precision_and_evidence

P01, P10 = 0.03, 0.15
SPARSITY = 0.8


def regression(seed: int, length: int = 200, samples: int = 120) -> dict[str, float]:
    """F1 of the support of a linear model, mean over 10 draws; noise of half the signal's strength.

    Both start alike with independent supports, which keeps the chain from an all-used fixed point.
    """
    g = torch.Generator().manual_seed(seed)
    hyper = Hyper(1.0, 1.0, 1.0, 1e-2)
    found = {"chain": 0.0, "independent": 0.0}
    for _ in range(10):
        truth, state = torch.zeros(length, dtype=torch.float64), False
        for n in range(length):
            leaves = float(torch.rand((), generator=g)) < (P10 if state else P01)
            state = state != leaves
            truth[n] = float(state)
        w = truth * torch.randn(length, generator=g, dtype=torch.float64)
        x = torch.randn(samples, length, generator=g, dtype=torch.float64)
        noise = 0.5 * float((x @ w).std()) + 1e-3
        y = x @ w + noise * torch.randn(samples, generator=g, dtype=torch.float64)
        for kind in found:
            prior = torch.full((length,), math.log(P01 / P10), dtype=torch.float64)
            precision = torch.ones(length, dtype=torch.float64)
            for step in range(40):
                covariance = torch.linalg.inv(x.T @ x / noise**2 + torch.diag(precision))
                mean = covariance @ (x.T @ y) / noise**2
                square = mean.square() + covariance.diagonal()
                precision, evidence = precision_and_evidence(square, prior, hyper)
                if kind == "chain" and step >= 15:
                    heard = chain_messages(evidence[None], P01, P10)[0]
                    prior = 0.3 * prior + 0.7 * heard
            kept = prior + evidence >= 0
            hits = float((kept * truth).sum())
            found[kind] += 2 * hits / max(1.0, float(kept.sum() + truth.sum())) / 10
    return {f"{k} F1": v for k, v in found.items()}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def run_length(record: Masks) -> float:
    """Mean length of a run of kept weights, along the rows of all tensors."""
    runs = sum(int((F.pad(m.float(), (1, 0)).diff(dim=1) > 0).sum()) for m in record.values())
    return sum(int(m.sum()) for m in record.values()) / max(1, runs)


def index_bits(record: Masks) -> float:
    """Bits of a run-length code: lengths of the alternating runs of each row in Elias gamma code,
    the first run of zeros plus one, since it may be empty."""
    bits = 0
    for mask in record.values():
        for row in mask.tolist():
            value, length, lengths = False, 0, []
            for entry in row:
                if entry != value:
                    lengths.append(length)
                    value, length = entry, 0
                length += 1
            lengths.append(length)
            lengths[0] += 1
            bits += sum(2 * (n.bit_length() - 1) + 1 for n in lengths)
    return float(bits)


def empty_units(record: Masks) -> float:
    """Hidden units without a kept input or without a kept output."""
    tensors = list(record.values())
    pairs = itertools.pairwise(tensors)
    return float(sum(int((~(a.any(1) & b.any(0))).sum()) for a, b in pairs))


def train(seed: int, coupling: str, epochs: int) -> tuple[float, Masks]:
    """Test accuracy in percent and masks; coupling "" is magnitude pruning."""
    data = digits()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    part, test = order[:1300], order[1300:]
    torch.manual_seed(seed)
    model = network()
    g = torch.Generator().manual_seed(seed)
    job = None
    groups = list(model.parameters())
    if coupling:
        job = sw.transform(
            model, "turbo-vbi", sparsity=SPARSITY, steps=epochs * 20, samples=len(part),
            coupling=coupling, temperature=0.1, rounds=5, include="*", seed=seed,
        )  # fmt: skip
        groups = job.parameter_groups(lr=1e-2)
    optimizer = torch.optim.Adam(groups, 3e-3)
    if job is not None:
        job.attach(optimizer)

    def pass_over(count: int, penalised: bool) -> None:
        model.train()
        for _ in range(count):
            for index in part[torch.randperm(len(part), generator=g)].split(65):
                loss = F.cross_entropy(model(data.normalized(index)), data.labels[index])
                optimizer.zero_grad()
                if penalised and job is not None:
                    loss = loss + job.penalty()
                loss.backward()
                optimizer.step()

    pass_over(epochs, True)
    if job is not None:
        job.finish()
    else:
        sw.prune(model, "magnitude", sparsity=SPARSITY, include="*")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    run = sw.sparsify(model, optimizer, "fixed")
    pass_over(epochs // 2, False)
    record = run.finish()
    with torch.no_grad():
        guess = model.eval()(data.normalized(test)).argmax(1)
    return 100 * float((guess == data.labels[test]).float().mean()), record


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    found = regression(seed)
    found["recovery gain"] = found["chain F1"] - found["independent F1"]
    epochs = 60 if setting == "full" else 20
    for name, coupling in (("chain", "row"), ("independent", "none"), ("magnitude", "")):
        accuracy, record = train(seed, coupling, epochs)
        found[f"{name} accuracy"] = accuracy
        found[f"{name} run length"] = run_length(record)
        found[f"{name} index bits"] = index_bits(record)
        found[f"{name} empty units"] = empty_units(record)
    chain, alone = found["chain run length"], found["independent run length"]
    found["longer runs"] = chain / alone - 2
    found["fewer index bits"] = 0.7 - found["chain index bits"] / found["independent index bits"]
    found["accuracy kept"] = found["chain accuracy"] - found["independent accuracy"] + 0.5
    found["accuracy of magnitude kept"] = (
        found["chain accuracy"] - found["magnitude accuracy"] + 0.5
    )
    found["more empty units"] = found["chain empty units"] - found["independent empty units"]
    return found


CLAIM = Claim(
    card="181",
    method="turbo-vbi",
    title="a Markov support finds clustered weights better and keeps networks regular",
    model="linear model of 200 coefficients; network 64-128-64-10 at 80 % sparsity",
    data="Gaussian regression, 120 samples, clustered support; scikit-learn's digits, 1,300 "
    "training and 497 test images, 20 + 10 epochs (full: 60 + 30)",
    baseline="the same posterior with independent supports; magnitude pruning",
    metric="F1 of the support; run lengths and bits of a run-length code; test accuracy",
    promises=(
        Promise("recovery gain", "support F1 above independent supports", margin=0.05),
        Promise("longer runs", "mean run of kept weights at least twice as long (ratio - 2)"),
        Promise("fewer index bits", "at least 30 % fewer index bits (0.7 - ratio)"),
        Promise("accuracy kept", "accuracy within 0.5 points of independent supports"),
        Promise("accuracy of magnitude kept", "accuracy within 0.5 points of magnitude pruning"),
        Promise("more empty units", "more empty hidden units than independent supports"),
    ),
    measure=measure,
    looks=(5, 10),
    version=2,
)
