"""The rules of a fair comparison on what is reported of the arms: `(arms, limits) -> Check`."""

from __future__ import annotations

import json
from typing import Any

from sparseworks.diagnostics.arms import Arm
from sparseworks.diagnostics.checks import (
    Arms,
    Check,
    Limits,
    dense_at_equal_cost,
    equal_facts,
    lacking_fact,
    listed,
    sparse_arms,
    spread,
)
from sparseworks.diagnostics.statistics import paired_interval

__all__ = ["RESULTS"]


def evaluation(arms: Arms, limits: Limits) -> Check:
    """One metric, on the same held-out data, that nothing was chosen on."""
    name = "evaluation"
    values = {a.name: a.one("eval_data") for a in arms}
    seen = [a.name for a in arms if a.one("eval_is_training") is True]
    if seen:
        return Check(name, "unfair", f"{listed(seen)}: the score is on data that was trained on",
                     "give a test set that no arm has seen", values)  # fmt: skip
    on_test = [a.name for a in arms if a.one("chosen_on") in ("test", a.one("eval_data"))
               and a.one("chosen_on") is not None]  # fmt: skip
    if on_test:
        return Check(
            name, "unfair", f"{listed(on_test)}: chosen on the data of the score",
            "choose checkpoints and hyperparameters on a validation set", values,
        )  # fmt: skip
    made = equal_facts(name, arms, ("metric", "eval_data"), "one metric on the same data",
                  "measure all arms by one metric on the same data")  # fmt: skip
    if made.verdict != "fair":
        return made
    for key in ("chosen_on", "eval_is_training"):
        lacking = lacking_fact(name, {a.name: a.one(key) for a in arms}, key, f"say {key}")
        if lacking is not None:
            return lacking
    return made


def seeds(arms: Arms, limits: Limits) -> Check:
    """Enough seeds, and how sure the order of the two best arms is."""
    counts = {a.name: len(a.scores) for a in arms}
    few = [n for n, c in counts.items() if c < limits.seeds]
    if not all(counts.values()):
        none = [n for n, c in counts.items() if not c]
        return Check("seeds", "unknown", f"no score of {listed(none)}",
                     "measure it: --eval-data in sparseworks train", counts)  # fmt: skip
    better = arms[0].one("higher_is_better") is not False
    mean = {a.name: sum(a.scores.values()) / len(a.scores) for a in arms}
    first, second = sorted(arms, key=lambda a: mean[a.name], reverse=better)[:2]
    common = sorted(first.scores.keys() & second.scores.keys(), key=str)
    gap = f"{first.name} {mean[first.name]:.4g}, {second.name} {mean[second.name]:.4g}"
    if len(common) > 1:
        sign = 1 if better else -1
        found = paired_interval([sign * (first.scores[s] - second.scores[s]) for s in common])
        sure = "certain" if found.low > 0 else "not certain"
        gap += (
            f"; {sure}: the difference is {found.mean:.3g}, 95 % interval {found.low:.3g} to "
            f"{found.high:.3g} over {len(common)} seeds"
        )
    if few:
        return Check("seeds", "unfair" if min(counts.values()) != max(counts.values()) else
                     "unknown", f"fewer than {limits.seeds} seeds: {listed(few)} ({gap})",
                     f"run {limits.seeds} seeds of every arm and pair them", counts)  # fmt: skip
    return Check("seeds", "fair", gap, values=counts)


def sparsity(arms: Arms, limits: Limits) -> Check:
    """Counted sparsity: as said, zeros really there, equal between the sparse arms."""
    name, judged = "sparsity", sparse_arms(arms)
    values = {a.name: a.number("sparsity") for a in judged}
    if not judged:
        return Check(name, "fair", "no arm is sparse")
    lacking = lacking_fact(
        name,
        values,
        "the counted sparsity",
        "count zeros (sparseworks inspect); a setting is not a measurement",
    )
    if lacking is not None:
        return lacking
    for arm in judged:
        counted, said = arm.number("sparsity") or 0.0, arm.number("nominal_sparsity")
        zeros = arm.number("zeros")
        if said is not None and abs(counted - said) > 0.005:
            return Check(name, "unfair", f"{arm.name} says {said:.1%} and has {counted:.1%}",
                         "report what is counted", values)  # fmt: skip
        if zeros is not None and zeros < counted - 1e-6:
            return Check(name, "unfair", f"{arm.name}: masks say {counted:.1%}, but only "
                         f"{zeros:.1%} of the weights are 0", "apply the masks before measuring",
                         values)  # fmt: skip
    low, high, _ = spread({n: v for n, v in values.items() if v is not None})
    gap = (values[high] or 0) - (values[low] or 0)
    if gap > 0.005:
        return Check(name, "unfair", f"{high} is {gap:.1%} sparser than {low}",
                     "compare at equal sparsity, or over a range of it", values)  # fmt: skip
    return Check(name, "fair", "counted, as said, and equal", values=values)


def layers(arms: Arms, limits: Limits) -> Check:
    """Sparsity over the same layers: embeddings, first and last layers in all arms or in none."""
    judged = sparse_arms(arms)
    values: dict[str, Any] = {
        a.name: None if (v := a.one("left_dense")) is None else sorted(v) for a in judged
    }
    if not judged:
        return Check("layers", "fair", "no arm is sparse")
    lacking = lacking_fact("layers", values, "which layers stay dense",
                       "say left_dense: the tensors that the sparsity does not count")  # fmt: skip
    if lacking is not None:
        return lacking
    sets = [set(v) for v in values.values()]
    odd = sorted(set.union(*sets) - set.intersection(*sets))
    if odd:
        return Check("layers", "unfair", f"dense in some arms only: {listed(odd)}",
                     "use the same include and exclude in all arms", values)  # fmt: skip
    whole = {a.name: _whole(a) for a in judged}
    told = [f"{n} {v:.1%}" for n, v in whole.items() if v is not None]
    of_all = f"; of all parameters, biases and norms included: {listed(told)}" if told else ""
    return Check("layers", "fair", f"the same {len(sets[0])} tensors stay dense{of_all}",
                 values=values)  # fmt: skip


def _whole(arm: Arm) -> float | None:
    all_, left = arm.number("parameters"), arm.number("nonzeros")
    return None if not all_ or left is None else 1 - left / all_


def inference_cost(arms: Arms, limits: Limits) -> Check:
    """Equal multiply-adds of a call: ERK and uniform masks of one size cost differently."""
    judged = sparse_arms(arms)
    values = {a.name: a.number("inference_macs") for a in judged}
    if len(judged) < 2:
        return Check("inference cost", "fair", "only one sparse arm", values=values)
    lacking = lacking_fact("inference cost", values, "the cost of a call", "say inference_macs")
    if lacking is not None:
        return lacking
    low, high, ratio = spread({n: v for n, v in values.items() if v is not None})
    if ratio <= 1 + limits.cost:
        return Check("inference cost", "fair", f"equal within {limits.cost:.0%}", values=values)
    return Check(
        "inference cost", "unfair", f"{high} takes {ratio:.3g} times the multiply-adds of {low} at "
        "its sparsity", "compare at equal multiply-adds too, or give all arms one budget", values,
    )  # fmt: skip


def speed(arms: Arms, limits: Limits) -> Check:
    """Speed is measured, never derived from zeros."""
    values = {a.name: a.number("latency_ms") for a in arms}
    claimed = {a.name: a.number("speedup") for a in arms}
    bare = [n for n, v in claimed.items() if v is not None and values[n] is None]
    if bare:
        return Check("speed", "unfair", f"{listed(bare)}: a speed-up without a measured latency",
                     "time it (sparseworks bench): zeros save time only where a kernel skips them",
                     values)  # fmt: skip
    unnamed = [a.name for a in arms
               if values[a.name] is not None and a.one("latency_backend") is None]  # fmt: skip
    if unnamed:
        return Check("speed", "unknown", f"what ran {listed(unnamed)} is not known",
                     "say latency_backend", values)  # fmt: skip
    told = [n for n, v in values.items() if v is not None]
    if told and len(told) < len(arms):
        rest = [n for n in values if n not in told]
        return Check("speed", "unknown", f"timed for {listed(told)} only",
                     f"time {listed(rest)} in the same run", values)  # fmt: skip
    reason = "timed for all arms" if told else "no speed is claimed"
    return Check("speed", "fair", reason, values=values)


def wall_clock(arms: Arms, limits: Limits) -> Check:
    """The time of training is known, on one machine."""
    values = {a.name: a.number("seconds") for a in arms}
    lacking = lacking_fact("wall clock", values, "the time of training", "say seconds and machine")
    if lacking is not None:
        return lacking
    machines = {json.dumps(a.one("machine"), sort_keys=True, default=str) for a in arms}
    if len(machines) > 1 or "null" in machines:
        return Check("wall clock", "unknown", "on different or unknown machines",
                     "time all arms on one machine before comparing seconds", values)  # fmt: skip
    low, high, ratio = spread({n: v for n, v in values.items() if v is not None})
    told = f"{high} took {ratio:.3g} times the seconds of {low}" if ratio > 1 else "equal"
    return Check("wall clock", "fair", f"known for all, on one machine: {told}", values=values)


def paths(arms: Arms, limits: Limits) -> Check:
    """Arms that start dense and arms that start sparse are not compared by the score alone."""
    judged = sparse_arms(arms)
    values = {a.name: " / ".join(filter(None, (a.one("when"), a.one("path")))) or None
              for a in judged}  # fmt: skip
    lacking = lacking_fact("kind of method", values, "when and on which path the zeros come",
                       "say when and path, or use the name of a registered method")  # fmt: skip
    if lacking is not None:
        return lacking
    if len(set(values.values())) <= 1:
        return Check("kind of method", "fair", "all sparse arms are of one kind", values=values)
    if all(a.number("training_macs") is not None for a in judged):
        return Check("kind of method", "fair", "different kinds, and the training cost of each is "
                     "known; report it and the peak density beside the score",
                     values=values)  # fmt: skip
    return Check("kind of method", "unfair", "different kinds, by the score alone",
                 "record the training cost of every arm and report it beside the score",
                 values)  # fmt: skip


def baselines(arms: Arms, limits: Limits) -> Check:
    """Dense, dense at the sparse arms' cost, and random masks are among the arms."""
    dense = [a for a in arms if a.dense]
    values = {a.name: a.one("method") for a in arms}
    missing = [] if dense else ["the dense network"]
    equal = dense_at_equal_cost(arms, limits)
    if not equal:
        missing.append("a dense network at the training cost of the sparse arms")
    if not {"static", "random", "random-search"} & set(values.values()):
        missing.append("random masks (static)")
    if missing:
        return Check("baselines", "unknown", f"without {listed(missing)} it is not known what the "
                     "method itself adds", "train them too, with the same recipe",
                     values)  # fmt: skip
    return Check("baselines", "fair", "dense, dense at equal cost, and random masks are here",
                 values=values)  # fmt: skip


RESULTS = (
    evaluation, seeds, sparsity, layers, inference_cost, speed, wall_clock, paths, baselines,
)  # fmt: skip
