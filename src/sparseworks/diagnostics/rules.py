"""The rules of a fair comparison on how the arms were trained: `(arms, limits) -> Check`."""

from __future__ import annotations

import json

from sparseworks.diagnostics.checks import (
    Arms,
    Check,
    Limits,
    dense_at_equal_cost,
    equal_facts,
    lacking_fact,
    listed,
    same_start,
    sparse_arms,
    spread,
    total_cost,
)

__all__ = ["TRAINING"]


def training_cost(arms: Arms, limits: Limits) -> Check:
    """Equal multiply-adds of training between the sparse arms."""
    name, judged = "training cost", sparse_arms(arms) or list(arms)
    own = {a.name: a.number("training_macs") for a in arms}
    chosen = [a.name for a in judged]
    lacking = lacking_fact(
        name, {n: own[n] for n in chosen}, "the training cost",
        "record it (sparseworks train does), or say training_macs: 3 f_s per sample and step, over "
        "all rounds",
    )  # fmt: skip
    if lacking is not None:
        return lacking
    totals = {a.name: total_cost(a) for a in judged}
    values: dict[str, float] = {n: v for n, v in own.items() if n in chosen and v is not None}
    if None not in totals.values():
        values = {n: v for n, v in totals.items() if v is not None}
    elif same_start(judged) is not True:
        return Check(
            name, "unknown", "what the starting weights cost is not known, and they differ",
            "start all arms from the same weights, or say start_macs", own,
        )  # fmt: skip
    low, high, ratio = spread(values)
    if ratio <= 1 + limits.cost:
        return Check(name, "fair", f"equal within {limits.cost:.0%}", values=own)
    return Check(
        name, "unfair", f"{high} took {ratio:.3g} times the multiply-adds of {low}",
        f"train {low} longer, or {high} shorter, until both cost the same; or plot the score over "
        "the cost", own,
    )  # fmt: skip


def schedule(arms: Arms, limits: Limits) -> Check:
    """Equal numbers of samples seen; a dense arm at the cost of the sparse ones needs others."""
    spared = dense_at_equal_cost(arms, limits)
    judged = [a for a in arms if a not in spared]
    unit = "samples" if all(a.number("samples") is not None for a in judged) else "epochs"
    values = {a.name: a.number(unit) for a in judged}
    lacking = lacking_fact("schedule", values, "how long it trained", "say epochs or samples")
    if lacking is not None:
        return lacking
    low, high, ratio = spread({n: v for n, v in values.items() if v is not None})
    if ratio <= 1 + limits.cost:
        return Check("schedule", "fair", f"all saw the same number of {unit}", values=values)
    return Check(
        "schedule", "unfair", f"{high} saw {ratio:.3g} times the {unit} of {low}",
        f"give {low} the same schedule, rounds and fine-tuning included", values,
    )  # fmt: skip


def data(arms: Arms, limits: Limits) -> Check:
    """The same training data."""
    return equal_facts(
        "training data", arms, ("data", "train_samples"), "the same data in every arm",
        "train all arms on the same samples; where an arm holds some out, hold them out of all",
    )  # fmt: skip


def batch(arms: Arms, limits: Limits) -> Check:
    """The same batch size."""
    return equal_facts("batch size", arms, ("batch_size",), "the same in every arm",
                  "use one batch size, or tune the learning rate for each")  # fmt: skip


def tuning(arms: Arms, limits: Limits) -> Check:
    """Hyperparameters tried as often on each side, the baselines' included."""
    trials = {a.name: a.number("trials") for a in arms}
    recipes = {a.name: a.one("recipe") for a in arms}
    known = {n: v for n, v in trials.items() if v is not None}
    if len(known) == len(arms):
        low, high, ratio = spread(known)
        if ratio <= 1.5:
            return Check("tuning", "fair", "as many settings tried in every arm", values=trials)
        return Check(
            "tuning", "unfair", f"{high} had {known[high]:g} settings tried, {low} {known[low]:g}",
            f"tune {low} with as many trials", trials,
        )  # fmt: skip
    texts = {json.dumps(r, sort_keys=True, default=str) for r in recipes.values() if r is not None}
    alike = "one recipe in all arms" if len(texts) == 1 else "recipes differ or are not known"
    if None in recipes.values():
        alike = "recipes are not known of all"
    return Check(
        "tuning", "unknown",
        f"{alike}; how many settings were tried is not known of "
        f"{listed([n for n, v in trials.items() if v is None])}",
        "say trials, in a description with `folder` for a recorded run (1: nothing was tuned)",
        trials,
    )  # fmt: skip


def start(arms: Arms, limits: Limits) -> Check:
    """The same starting weights."""
    values = {a.name: a.one("start") for a in arms}
    same = same_start(arms)
    if same is None:
        return Check("start", "unknown", "no seed whose starting weights are known of all arms",
                     "use the same seeds and checkpoint in all arms", values)  # fmt: skip
    if same:
        return Check("start", "fair", "the same weights in every arm, seed by seed", values=values)
    return Check("start", "unfair", "the arms start from different weights",
                 "start all from one checkpoint or initialisation", values)  # fmt: skip


TRAINING = (training_cost, schedule, data, batch, tuning, start)
