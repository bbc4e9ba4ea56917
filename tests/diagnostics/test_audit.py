"""The audit: a fair comparison passes every rule, and breaking one fact breaks its rule alone."""

from __future__ import annotations

import json

import pytest

import sparseworks as sw
from sparseworks.core import registry
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.diagnostics.taxonomy import taxonomy

DENSE = 3.0e9  # multiply-adds of training


def arm(method, **changes):
    """All that an audit asks, of an arm at 80 % (dense: none) that costs a fifth (dense: all)."""
    sparse = method not in ("dense", "short")
    cost = DENSE if method == "dense" else DENSE / 5
    facts = {
        "name": method, "method": method if sparse else "dense", "seeds": [0, 1, 2],
        "scores": [90.0, 90.5, 91.0], "metric": "accuracy", "higher_is_better": True,
        "eval_data": "test.parquet", "eval_is_training": False, "chosen_on": "validation",
        "data": "train.parquet", "train_samples": 1000, "epochs": 2 if method == "short" else 10,
        "samples": 2000 if method == "short" else 10_000, "batch_size": 50, "trials": 4,
        "recipe": {"lr": 0.1}, "start": "abc", "start_macs": 0.0, "training_macs": cost,
        "inference_macs": 20.0 if sparse else 100.0, "seconds": 9.0, "machine": {"cpu": "one"},
        "sparsity": 0.8 if sparse else 0.0, "nominal_sparsity": 0.8 if sparse else 0.0,
        "zeros": 0.8 if sparse else 0.0, "parameters": 1000, "nonzeros": 300,
        "left_dense": ["head.weight"] if sparse else [],
    }  # fmt: skip
    facts.update(changes)
    return {k: v for k, v in facts.items() if v is not None}


def fair(**changes):
    """Dense, dense at equal cost, random masks, and RigL with changes."""
    return [arm("dense"), arm("short"), arm("static"), arm("rigl", **changes)]


def verdicts(runs):
    return {c.name: c.verdict for c in sw.audit(runs).checks}


def test_a_fair_comparison_passes_every_rule():
    found = sw.audit(fair())
    assert {c.verdict for c in found.checks} <= {"fair"}, str(found)
    assert found.verdict == "fair"
    assert all(not c.advice for c in found.checks)
    json.dumps(found.to_dict(), allow_nan=False)


BROKEN = [
    ("training cost", {"training_macs": DENSE / 5 * 1.2}),
    ("training cost", {"start_macs": DENSE}),
    ("schedule", {"samples": 20_000}),
    ("training data", {"data": "other"}),
    ("training data", {"train_samples": 900}),
    ("batch size", {"batch_size": 100}),
    ("tuning", {"trials": 40}),
    ("start", {"start": "pretrained"}),
    ("evaluation", {"eval_is_training": True}),
    ("evaluation", {"chosen_on": "test"}),
    ("evaluation", {"chosen_on": "test.parquet"}),
    ("evaluation", {"eval_data": "easy"}),
    ("evaluation", {"metric": "top-5"}),
    ("seeds", {"seeds": [0], "scores": [99.0]}),
    ("sparsity", {"nominal_sparsity": 0.9}),
    ("sparsity", {"zeros": 0.5}),
    ("sparsity", {"sparsity": 0.7, "nominal_sparsity": 0.7}),
    ("layers", {"left_dense": ["head.weight", "embedding.weight"]}),
    ("inference cost", {"inference_macs": 40.0}),
    ("speed", {"speedup": 5.0}),
]


@pytest.mark.parametrize(("rule", "changes"), BROKEN, ids=lambda v: str(v)[:40])
def test_one_unfair_fact_is_flagged_by_its_rule_alone(rule, changes):
    found = sw.audit(fair(**changes))
    assert found.verdict == "unfair"
    odd = {c.name: c for c in found.checks if c.verdict != "fair"}
    assert set(odd) == {rule}, str(found)
    assert odd[rule].verdict == "unfair" and odd[rule].advice


UNKNOWN = [
    ("tuning", "trials"), ("training data", "data"), ("batch size", "batch_size"),
    ("evaluation", "chosen_on"), ("evaluation", "eval_is_training"), ("sparsity", "sparsity"),
    ("layers", "left_dense"), ("wall clock", "seconds"), ("wall clock", "machine"),
    ("start", "start"), ("seeds", "scores"), ("inference cost", "inference_macs"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "key"), UNKNOWN)
def test_a_missing_fact_is_unknown_and_never_fair(rule, key):
    found = sw.audit(fair(**{key: None}))
    assert {c.name for c in found.checks if c.verdict != "fair"} == {rule}, str(found)
    assert found[rule].verdict == "unknown" and found.verdict == "unknown"
    assert "rigl" in found[rule].reason or rule in ("start", "wall clock")


def test_without_costs_different_kinds_are_not_compared_by_score():
    runs = [arm("dense"), arm("static", training_macs=None), arm("gradual", training_macs=None)]
    found = verdicts(runs)
    assert found["kind of method"] == "unfair" and found["training cost"] == "unknown"
    known = verdicts([arm("dense"), arm("static"), arm("gradual")])
    assert known["kind of method"] == "fair"
    alike = verdicts([arm("set", training_macs=None), arm("rigl", training_macs=None)])
    assert alike["kind of method"] == "fair"


def test_baselines_that_are_missing_are_named():
    reason = sw.audit([arm("rigl"), arm("set")])["baselines"].reason
    assert "the dense network" in reason and "random masks" in reason
    no_short = sw.audit([arm("dense"), arm("static"), arm("rigl")])["baselines"]
    assert no_short.verdict == "unknown"
    assert "at the training cost" in no_short.reason and "random" not in no_short.reason


def test_the_difference_of_the_two_best_comes_with_its_interval():
    close = sw.audit(fair(scores=[91.0, 90.0, 91.2]))["seeds"].reason
    assert "not certain" in close
    far = sw.audit(
        [arm("static", scores=[50.0, 51.0, 50.5]), arm("rigl", scores=[60.0, 61.1, 60.4])]
    )
    assert "; certain" in far["seeds"].reason
    lower = [arm(m, higher_is_better=False, scores=s) for m, s in
             (("static", [5.0, 5.1, 5.2]), ("rigl", [9.0, 9.1, 9.2]))]  # fmt: skip
    assert sw.audit(lower)["seeds"].reason.startswith("static 5.1")


def test_speed_needs_a_time_and_what_ran_it():
    timed = {"latency_ms": 2.0, "latency_backend": "sparseworks", "speedup": 3.0}
    runs = [arm(m, **{**timed, "speedup": None}) for m in ("dense", "short", "static")]
    assert verdicts([*runs, arm("rigl", **timed)])["speed"] == "fair"
    assert (
        verdicts([*runs, arm("rigl", **{**timed, "latency_backend": None})])["speed"] == "unknown"
    )
    assert verdicts([*runs, arm("rigl")])["speed"] == "unknown"


def test_descriptions_are_read_from_files(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps({"runs": fair()}))
    assert sw.audit([tmp_path / "all.json"]).verdict == "fair"
    yaml = pytest.importorskip("yaml")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(fair()[:2]))
    (tmp_path / "rest.yml").write_text(yaml.safe_dump(fair()[2:]))
    found = sw.audit([tmp_path / "two.yaml", str(tmp_path / "rest.yml")])
    assert found.verdict == "fair"
    assert [a.name for a in found.arms] == ["dense", "short", "static", "rigl"]
    bench = {"rows": [{"candidate": "torch", "batch": 1, "median_ms": 9.0},
                      {"candidate": "ours", "batch": 1, "median_ms": 4.0}]}  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    (tmp_path / "one.json").write_text(json.dumps({**arm("rigl"), "bench": "bench.json"}))
    arms = sw.audit([*fair()[:3], tmp_path / "one.json"]).arms
    assert arms[3].number("latency_ms") == 4.0 and arms[3].one("latency_backend") == "ours"


def test_seeds_make_one_arm_and_names_keep_arms_apart():
    singles = [arm("rigl", seeds=[s], scores=[90.0 + s]) for s in range(3)]
    arms = sw.audit([arm("dense"), *singles]).arms
    assert [a.name for a in arms] == ["dense", "rigl"]
    assert arms[1].scores == {0: 90.0, 1: 91.0, 2: 92.0}
    apart = sw.audit([arm("rigl"), arm("rigl", recipe={"lr": 1})]).arms
    assert [a.name for a in apart] == ["rigl", "rigl (2)"]


def test_what_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="two arms"):
        sw.audit([arm("rigl")])
    with pytest.raises(InvalidArgument, match="not facts of a run"):
        sw.audit([arm("rigl", sparsitty=0.5), arm("dense")])
    with pytest.raises(InvalidArgument, match="no such folder"):
        sw.audit([tmp_path / "nothing", arm("dense")])
    with pytest.raises(DataError, match="holds no finished run"):
        sw.audit([tmp_path, arm("dense")])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        sw.audit([tmp_path / "broken.json"])
    with pytest.raises(InvalidArgument, match="3 scores of 2 seeds"):
        sw.audit([arm("rigl", seeds=[1, 2])])
    with pytest.raises(InvalidArgument, match="seeds=0"):
        sw.audit(fair(), seeds=0)


def test_the_taxonomy_knows_paths():
    assert taxonomy("rigl").path == taxonomy("snip").path == "sparse to sparse"
    assert taxonomy("gradual").path == taxonomy("magnitude").path == "dense to sparse"
    assert taxonomy("static").masks == "static" and taxonomy("set").masks == "moving"
    assert taxonomy("wanda").needs == ("data",) and taxonomy("dense").when == "never"
    for name in registry.names():
        if registry.resolve(name).info.kind not in ("measurement", "optimizer"):
            assert taxonomy(name).goal
    with pytest.raises(InvalidArgument, match="measures"):
        taxonomy("fair-comparison")
