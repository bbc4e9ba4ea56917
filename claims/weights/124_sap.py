"""The sparsity index over rounds of pruning, and adaptive amounts against a fixed fifth.

Up to 17 seeds, as many as five minutes allow, because 8 left the rise of the index open.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.core.masks import masks
from sparseworks.core.measures import gini_index, pq_index
from sparseworks.data.images import ImageSet, digits
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.judging import LOOKS
from sparseworks.diagnostics.metrics import accuracy
from sparseworks.training.fitting import Recipe, fit_classifier

ROUNDS, LAST = 20, 36  # of adaptive amounts, which fall with the index; of fixed ones
CASES = {
    "sap": ("sap", {"rounds": ROUNDS}),
    "fixed": ("rewinding", {"rounds": LAST, "rewind": 0.0, "sparsity": 1 - 0.8**LAST}),
}
COLLAPSE = 30.0  # points below the dense accuracy: well into the collapse
NOISE = 0.01  # a move of the index that counts


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def _survivors(model: nn.Module) -> Tensor:
    record = masks(model)
    weights = dict(model.named_parameters())
    names = ["1.weight", "3.weight"]
    return torch.cat([
        weights[n].detach()[record[n]] if record is not None else weights[n].detach().flatten()
        for n in names
    ])  # fmt: skip


def _curve(seed: int, case: str, setting: Setting) -> list[dict[str, float]]:
    """Per round: sparsity, PQ and Gini index of the survivors, held-out accuracy."""
    data = digits()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    part, rest = order[:1200], order[1200:]
    train = ImageSet(data.pixels[part], data.labels[part], data.mean, data.std)
    held = ImageSet(data.pixels[rest], data.labels[rest], data.mean, data.std)
    measured = accuracy(held.batches(600))
    recipe = Recipe(epochs=60 if setting == "full" else 12, batch_size=100, lr=0.1, augment=False)

    def fit(model, *, start, seed, first_step):
        fit_classifier(model, train, recipe, start=start, seed=seed)

    torch.manual_seed(seed)
    model = perceptron()
    method, options = CASES[case]
    done = sw.experiment(fit, model, method, seed=seed, **options)
    rows = []
    for run in done.finished.values():
        net = run.into(perceptron()).eval()
        left = _survivors(net)
        rows.append({
            "sparsity": 100 * run.figures["sparsity"],
            "index": float(pq_index(left)),
            "gini": float(gini_index(left)),
            "accuracy": measured(net),
        })  # fmt: skip
    return rows


def _highest(rows: list[dict[str, float]], loss: float) -> float:
    """The sparsity up to which every round stays within `loss` points of the dense network."""
    reached = 0.0
    for row in rows:
        if row["accuracy"] < rows[0]["accuracy"] - loss:
            break
        reached = row["sparsity"]
    return reached


def _ahead(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """Mean accuracy above the other curve, between its rounds, at our rounds beyond 50 %."""
    found = []
    for row in ours:
        after = next((t for t, r in enumerate(theirs) if r["sparsity"] >= row["sparsity"]), None)
        if row["sparsity"] >= 50 and after:
            left, right = theirs[after - 1], theirs[after]
            way = (row["sparsity"] - left["sparsity"]) / (right["sparsity"] - left["sparsity"])
            between = left["accuracy"] + way * (right["accuracy"] - left["accuracy"])
            found.append(row["accuracy"] - between)
    return sum(found) / len(found) if found else 0.0


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
    found: dict[str, float] = {}
    curves = {case: _curve(seed, case, setting) for case in CASES}
    for case, rows in curves.items():
        found[f"{case} sparsity within 2 points"] = _highest(rows, 2.0)
        found[f"{case} last sparsity"] = rows[-1]["sparsity"]
        found[f"{case} last accuracy"] = rows[-1]["accuracy"]
        to_ninety = next((t for t, r in enumerate(rows) if r["sparsity"] >= 90), len(rows))
        found[f"{case} rounds to 90 %"] = float(to_ninety)
    rows = curves["fixed"]  # it goes all the way down; the adaptive one slows with its index
    floor = rows[0]["accuracy"] - COLLAPSE
    end = next((t for t, r in enumerate(rows) if r["accuracy"] < floor), len(rows) - 1)
    index = [r["index"] for r in rows[: end + 1]]
    lowest = min(range(len(index)), key=index.__getitem__)
    found |= {
        "dense accuracy": rows[0]["accuracy"],
        "dense index": index[0],
        "lowest index": index[lowest],
        "lowest index at sparsity": rows[lowest]["sparsity"],
        "index at collapse": index[-1],
        "sparsity at collapse": rows[end]["sparsity"],
        "Gini falls to collapse": rows[0]["gini"] - rows[end]["gini"],
        "last adaptive share": 100 * curves["sap"][-1]["index"],
        "index falls": index[0] - index[lowest] - NOISE,
        "index rises": index[-1] - index[lowest] - NOISE,
        "accuracy over fixed": _ahead(curves["sap"], rows),
    }
    return found


CLAIM = Claim(
    card="124",
    method="sap",
    title="the sparsity index falls, then rises as the network collapses; it sets the amounts",
    model="a 64-128-128-10 perceptron, pruned up to 20 rounds (fixed: 36) from its initialisation",
    data="scikit-learn's digits: 1,200 to train for 12 epochs a round (full: 60), 597 held out",
    baseline="the same loop with a fifth of the survivors every round (lottery ticket)",
    metric="PQ index of the survivors (p = 1/2, q = 1); held-out accuracy; sparsity in %",
    promises=(
        Promise("index falls", "the index falls by more than 0.01 below the dense network's"),
        Promise("index rises", "then rises by more than 0.01 until accuracy is 30 points down"),
        Promise("accuracy over fixed", "accuracy above the fixed fifth's at equal sparsity",
                negligible=0.25),
    ),
    measure=measure,
    looks=(*LOOKS, 17),
    version=3,
)  # fmt: skip
