"""An audit of five ways to a sparse ResNet-20: at equal epochs, and at equal training cost.

At equal epochs every training takes as long, so iterative pruning trains three times. At equal cost
all arms get the multiply-adds of a short iterative pruning. Digits at 8 x 8 stand in for CIFAR-10.
Up to 5 seeds, what five CPU-minutes allow, because 3 left the lead of tickets open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch

import sparseworks as sw
from sparseworks.data.epochs import ImageEpochs
from sparseworks.data.images import ImageSet, digits
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.costs import experiment_facts, training_facts
from sparseworks.diagnostics.metrics import Metric, accuracy
from sparseworks.models.zoo import resnet20
from sparseworks.training.fitting import Recipe, fit_classifier
from sparseworks.training.loop import Training
from sparseworks.training.planning import Plan, Sparse
from sparseworks.training.runs import digest_of_model

SPARSITY, BATCH = 0.8, 100
EVERY = {"rigl": {"every": 5}, "gradual": {"every": 5}, "static": {}}


def _subject(seed: int) -> tuple[ImageSet, Metric]:
    data = digits()
    pixels = data.pixels.expand(-1, 3, -1, -1)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1300], order[1300:]
    held = ImageSet(pixels[test], data.labels[test])
    return ImageSet(pixels[train], data.labels[train]), accuracy(held.batches(500))


def _model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return resnet20().to(memory_format=torch.channels_last)


def _arm(name: str, seed: int, images: ImageSet, metric: Metric, epochs: int) -> dict[str, Any]:
    """One arm with all that the audit asks."""
    model = _model(seed)
    start, example = digest_of_model(model), images.normalized(slice(0, 2))
    parameters = sum(p.numel() for p in model.parameters())
    if name == "rewinding":
        recipe = Recipe(epochs=epochs, batch_size=BATCH, lr=0.05, augment=False)
        done = sw.experiment(
            lambda net, **given: fit_classifier(net, images, recipe, **given),
            model, name, sparsity=SPARSITY, rounds=2, rewind=0.0, seed=seed,
            data=images.batches(200, samples=400),
        )  # fmt: skip
        facts = experiment_facts(done, example[:1], batch_size=BATCH, per_epoch=13)
    else:
        if name == "crop":
            sw.slim(model, example, params=1 - SPARSITY)
        sparse = None
        if name in EVERY:
            sparse = Sparse(name, SPARSITY, {"seed": seed, **EVERY[name]})
        plan = Plan(epochs=epochs, batch_size=BATCH, lr=0.05, augment=False, seed=seed)
        batches = ImageEpochs(images, BATCH, seed, augment=False)
        training = Training(model, plan, batches, sparse=sparse)
        training.fit()
        if training.run is not None:
            training.run.finish()
        facts = training_facts(training)
    if name == "crop":
        facts["sparsity"] = 1 - facts["parameters"] / parameters
    return {
        **facts, "name": name, "method": name, "seed": seed, "score": metric(model),
        "metric": "accuracy", "higher_is_better": True, "eval_data": "digits, held out",
        "eval_is_training": False, "chosen_on": "nothing", "data": "digits", "trials": 1,
        "train_samples": 1300, "start": start, "start_macs": 0.0, "recipe": {"lr": 0.05},
    }  # fmt: skip


def _formula(arm: Mapping[str, Any], epochs: int) -> float:
    """Closed formulas of shapes and schedule: the cost of a dense, static or RigL training."""
    kept = dense = 0.0
    for name, parameter in resnet20().named_parameters():
        if parameter.ndim > 1:
            side = {"layer2": 4, "layer3": 2, "linear": 1}.get(name.split(".")[0], 8)
            macs = parameter.numel() * side * side
            dense, kept = dense + macs, kept + macs * arm["tensors"].get(name, 1.0)
    steps = 13 * epochs
    updates = int(0.75 * steps) // 5 if arm["name"] == "rigl" else 0
    return BATCH * (3 * kept * steps + updates * (dense - kept))


def _discordant(a: Mapping[str, float], b: Mapping[str, float]) -> int:
    return sum((a[x] - a[y]) * (b[x] - b[y]) < 0 for x, y in combinations(sorted(a), 2))


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    images, metric = _subject(seed)
    short, long = (8, 10) if setting == "full" else (4, 5)
    names = ("dense", "gradual", "rigl", "static", "rewinding", "crop")
    same_epochs = {n: _arm(n, seed, images, metric, long) for n in names}
    base = _arm("rewinding", seed, images, metric, short)
    same_cost = {"rewinding": base}
    for name in names:
        if name != "rewinding":
            an_epoch = same_epochs[name]["training_macs"] / long
            count = max(1, round(base["training_macs"] / an_epoch))
            same_cost[name] = _arm(name, seed, images, metric, count)
    error = max(
        abs(same_epochs[n]["training_macs"] / _formula(same_epochs[n], long) - 1)
        for n in ("dense", "static", "rigl")
    )
    unfair, fair = (sw.audit(list(a.values()), cost=0.1) for a in (same_epochs, same_cost))
    sparse = ("gradual", "rigl", "static", "rewinding", "crop")
    before, after = ({n: a[n]["score"] for n in sparse} for a in (same_epochs, same_cost))

    def lead(scores: Mapping[str, float]) -> float:
        others = [v for n, v in scores.items() if n != "rewinding"]
        return scores["rewinding"] - sum(others) / len(others)

    return {
        **{f"{n} at equal epochs": a["score"] for n, a in same_epochs.items()},
        **{f"{n} at equal cost": a["score"] for n, a in same_cost.items()},
        **{f"{n} GMAC at equal epochs": a["training_macs"] / 1e9 for n, a in same_epochs.items()},
        **{f"{n} GMAC at equal cost": a["training_macs"] / 1e9 for n, a in same_cost.items()},
        "relative error of counts": error,
        "counts agree": 0.01 - error,
        "pairs that change order": float(_discordant(before, after)),
        "order changes": math.log(max(0.25, _discordant(before, after)) / 0.5),
        "tickets fall": lead(before) - lead(after),
        "unfair is flagged": 1.0 if unfair["training cost"].verdict == "unfair" else -1.0,
        "fair passes": 1.0 if fair["training cost"].verdict == "fair" else -1.0,
        "dense at equal cost": 1.0 if "at the training cost" not in fair["baselines"].reason
        else -1.0,
    }  # fmt: skip


CLAIM = Claim(
    card="082",
    method="fair-comparison",
    title="the order of sparse methods depends on what is held equal, and the audit tells",
    model="ResNet-20 from scratch, 80 % sparse: gradual, RigL, static, tickets, channels cut",
    data="scikit-learn's digits as 8 x 8 RGB images: 1,300 for training, 497 for testing",
    baseline="the same arms at equal epochs; dense at the cost of the sparse ones",
    metric="test accuracy, points; multiply-adds of training",
    promises=(
        Promise("counts agree", "recorded cost within 1 % of closed formulas", exact=True),
        Promise("order changes", "a pair of methods changes its order (log of pairs over 1/2)"),
        Promise("tickets fall", "the lead of tickets falls from equal epochs to equal cost"),
        Promise("unfair is flagged", "equal epochs: training cost is unfair", exact=True),
        Promise("fair passes", "equal cost: training cost is fair within 10 %", exact=True),
        Promise("dense at equal cost", "the dense network at equal cost is there", exact=True),
    ),
    measure=measure,
    looks=(3, 5),
)
