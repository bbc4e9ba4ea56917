"""Sweeps: a task is done once, wherever it runs; over Ray the results are those of one process."""

from __future__ import annotations

import json
import os
import sys
import threading

import pytest
import torch

import tiny_models
from sparseworks.cli import main
from sparseworks.core.errors import DataError
from sparseworks.diagnostics import claims
from sparseworks.diagnostics.sweeping import Cluster, sweep

NET = f"{tiny_models.__file__}:net"


class Squares:
    """Squares; a line in a file for each call, and for each that is made."""

    def __init__(self, log, broken=()):
        self.log, self.broken = log, broken
        self.say("made")

    def say(self, what):
        with open(self.log, "a") as file:
            file.write(f"{what} {os.getpid()}\n")

    def __call__(self, number):
        self.say(number)
        if number in self.broken:
            raise DataError(f"{number} has no square")
        return {"square": number * number, "threads": torch.get_num_threads(), "at": os.getcwd()}


class Make:
    """What makes a subject, as pickle can say it."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __call__(self):
        return Squares(*self.arguments)


TASKS = {f"n{i}": (i,) for i in range(7)}


@pytest.fixture(scope="module")
def two_workers():
    """A local Ray of two workers of a thread each."""
    ray = pytest.importorskip("ray")
    threads = torch.get_num_threads()
    patch = pytest.MonkeyPatch()
    places = (os.path.dirname(f) for f in (__file__, tiny_models.__file__))
    patch.setenv("PYTHONPATH", os.pathsep.join(places))  # where workers find `Make`
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    patch.undo()
    torch.set_num_threads(threads)


def said(log):
    return [line.split()[0] for line in log.read_text().splitlines()]


def test_a_task_is_done_once(tmp_path):
    log, folder, told = tmp_path / "log", tmp_path / "tasks", []
    with pytest.raises(DataError, match="3 has no square"):
        sweep(Make(log, (3,)), TASKS, folder=folder)
    assert sorted(p.stem for p in folder.iterdir()) == ["n0", "n1", "n2"]
    found = sweep(Make(log), TASKS, folder=folder, progress=lambda *now: told.append(now))
    assert [found[f"n{i}"]["square"] for i in range(7)] == [i * i for i in range(7)]
    assert list(found) == list(TASKS) and told == [(i + 1, 7, f"n{i}") for i in range(3, 7)]
    assert said(log) == ["made", "0", "1", "2", "3", "made", "3", "4", "5", "6"]
    assert sweep(Make(log), TASKS, folder=folder) == found
    assert len(said(log)) == 10  # nothing was left, so no subject was made either


def test_workers_find_the_same_and_resume(two_workers, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "tasks"
    alone = sweep(Make(tmp_path / "alone"), TASKS)
    with Cluster() as cluster:
        assert cluster.slots == 2 and not cluster.joined
        with pytest.raises(DataError, match="6 has no square"):
            sweep(Make(log, (6,)), TASKS, folder=folder, cluster=cluster)
        before = said(log)
        done = {p.stem for p in folder.iterdir()}
        assert "n6" not in done and set(before) >= {n[1:] for n in done} | {"6"}
        found = sweep(Make(log), TASKS, folder=folder, cluster=cluster)
    assert found == alone and list(found) == list(TASKS)
    again = set(said(log)[len(before) :]) - {"made"}
    assert again == {n[1:] for n in TASKS if n not in done}
    assert str(os.getpid()) not in {line.split()[1] for line in log.read_text().splitlines()}


class Meeting:
    """Answers once all are there."""

    def __call__(self, folder, name, names):
        (folder / name).touch()
        wait, rounds = threading.Event(), 0
        while not all((folder / n).is_file() for n in names):
            rounds += 1
            assert not wait.wait(0.05) and rounds < 4000, "the others do not come"
        return {"process": os.getpid()}


def test_two_workers_work_at_once(two_workers, tmp_path):
    tasks = {n: (tmp_path, n, ("a", "b")) for n in ("a", "b")}
    with Cluster() as cluster:
        found = sweep(Meeting, tasks, cluster=cluster)
    assert len({f["process"] for f in found.values()} - {os.getpid()}) == 2


SWEEPS = {
    "compare": ["--methods", "magnitude", "random", "--sparsities", "0.5", "0.7", "--seeds", "0",
                "1"],
    "curve": ["--methods", "magnitude", "random", "--sparsities", "0.3", "0.6", "0.9"],
}  # fmt: skip


def words(command, out, *more):
    return [command, NET, *SWEEPS[command], "--metric", "accuracy", "--eval-data", "digits",
            "--eval-samples", "64", "--out", str(out), *more]  # fmt: skip


def plain(out, command):
    """Results without what is of the clock, the machine or the place."""
    found = json.loads((out / {"compare": "compare.json", "curve": "result.json"}[command])
                       .read_text())  # fmt: skip
    del found["options"], found["machine"]
    for row in found.get("rows", ()):
        del row["seconds"]
    for point in found.get("points", ()):
        del point["values"]["seconds"]
    return found


@pytest.mark.parametrize("command", sorted(SWEEPS))
def test_commands_over_ray_write_the_same(two_workers, tmp_path, command):
    pytest.importorskip("plotly")
    assert main(words(command, tmp_path / "alone")) == 0
    assert main(words(command, tmp_path / "ray", "--ray")) == 0
    assert plain(tmp_path / "ray", command) == plain(tmp_path / "alone", command)
    files = [sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("ray", "alone")]
    assert files[0] == files[1] and "tasks" not in files[0]


@pytest.mark.parametrize("command", sorted(SWEEPS))
def test_commands_go_on_where_they_were_interrupted(tmp_path, command, monkeypatch, capsys):
    pytest.importorskip("plotly")
    out = tmp_path / "out"
    assert main(words(command, tmp_path / "whole")) == 0
    from sparseworks.diagnostics import sweeping

    whole, calls = sweeping.atomic_file, []

    def interrupted(path):
        calls.append(path)
        if len(calls) == 2:  # the second answer
            raise KeyboardInterrupt
        return whole(path)

    monkeypatch.setattr(sweeping, "atomic_file", interrupted)
    assert main(words(command, out)) == 130
    monkeypatch.setattr(sweeping, "atomic_file", whole)
    [kept] = [p for p in (out / "tasks").iterdir() if p.name != "asked.json"]
    stamp = kept.stat().st_mtime_ns
    assert main(words(command, out)) == 1 and "already exists" in capsys.readouterr().err
    assert main(words(command, out, "--resume", "--seeds", "5")) == 1
    assert "go on with the same options" in capsys.readouterr().err
    assert kept.stat().st_mtime_ns == stamp
    assert main(words(command, out, "--resume")) == 0
    assert plain(out, command) == plain(tmp_path / "whole", command)
    assert main(words(command, out, "--resume")) == 1
    assert "nothing was begun" in capsys.readouterr().err


def test_an_error_before_the_first_answer_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    broken = tmp_path / "broken.py"
    broken.write_text("def score(model):\n    raise OSError('no score')\n")
    command = ["compare", NET, "--methods", "magnitude", "--sparsities", "0.5", "--metric",
               f"{broken}:score", "--out", str(out)]  # fmt: skip
    assert main(command) == 1 and "no score" in capsys.readouterr().err
    assert not out.exists()
    assert main(["compare", NET, "--methods", "magnitude", "--resume"]) == 1
    assert "give --out" in capsys.readouterr().err


CLAIM = """
from pathlib import Path
from sparseworks.diagnostics.claims import Claim, Promise
LOG = Path(__file__).parent / "log"
def measure(seed, setting):
    with LOG.open("a") as log:
        log.write(f"{seed}\\n")
    return {"up": 1.0 + 0.1 * seed, "late": (3.0, -1.0, 2.9)[seed % 3] if seed < 3 else 2.0}
CLAIM = Claim("a01", "none", "t", "m", "d", "b", "k",
    tuple(Promise(n, n, 0.5) for n in ("up", "late")), measure, looks=(3, 5, 8, 12))
"""


def test_claims_over_ray_judge_the_same_seeds(two_workers, tmp_path, monkeypatch, capsys):
    results = []
    for place, more in (("alone", []), ("ray", ["--ray"])):
        for card in ("a01", "a02"):
            path = tmp_path / place / "claims" / "weights" / f"{card}_test.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(CLAIM.replace("a01", card))
        runs, folder = tmp_path / place / "runs", tmp_path / place / "claims"
        assert main(["claims", "run", "a01", "a02", "--folder", str(folder), "--runs", str(runs),
                     *more]) == 0  # fmt: skip
        assert "a01 t: " in capsys.readouterr().out
        found = [json.loads(p.read_text()) for p in sorted(folder.glob("*/*.json"))]
        for result in found:
            del result["seconds"], result["cpu_seconds"]
        log = (folder / "weights" / "log").read_text().split()
        results.append((found, sorted(log)))
    assert results[0] == results[1]
    seeds = len(results[0][0][0]["seeds"])
    assert seeds in (5, 8, 12)  # it took a second look, and no seed was measured twice
    assert results[0][1] == sorted([str(s) for s in range(seeds)] * 2)
    files = claims.find_claims(tmp_path / "ray" / "claims")
    claims.run(files["a01"], runs=tmp_path / "ray" / "runs")
    log = (tmp_path / "ray" / "claims" / "weights" / "log").read_text().split()
    assert sorted(log) == results[1][1]


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(words("curve", tmp_path / "out", "--ray")) == 1
    assert "pip install 'sparseworks[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
