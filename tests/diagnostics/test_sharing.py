"""Processes that share a folder: no task twice, none lost, and the last one clears up."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparseworks.core.errors import InvalidArgument
from sparseworks.diagnostics.sharing import Shared, claimed
from sparseworks.diagnostics.sweeping import sweep

PROCESSES = multiprocessing.get_context("spawn")
TASKS = {f"n{i}": (i,) for i in range(8)}


class Slow:
    """Squares after a moment, with a line in a file for each; never ends at one number."""

    def __init__(self, log: Path, endless: int | None = None) -> None:
        self.log, self.endless = log, endless

    def __call__(self, number: int) -> dict[str, int]:
        with self.log.open("a") as file:
            file.write(f"{number} {os.getpid()}\n")
        time.sleep(1000 if number == self.endless else 0.05)
        return {"square": number * number}


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 600
    while not true():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def work(folder: Path, log: Path, endless: int | None = None, together: int = 1) -> None:
    shared = Shared(folder / "tasks", {"tasks": len(TASKS)}, "join")
    (folder / f"here-{os.getpid()}").touch()
    until(lambda: len(list(folder.glob("here-*"))) >= together)
    found = sweep(lambda: Slow(log, endless), TASKS, folder=shared.folder)
    (folder / f"found-{os.getpid()}.json").write_text(json.dumps(found))
    shared.finish()


def started(*arguments: object) -> multiprocessing.context.SpawnProcess:
    process = PROCESSES.Process(target=work, args=arguments)
    process.start()
    return process


def test_processes_share_the_tasks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    three = [started(tmp_path, log, None, 3) for _ in range(3)]
    for process in three:
        process.join(600)
    assert [p.exitcode for p in three] == [0, 0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(n) for n, _ in lines) == list(range(8))  # each once
    assert len({who for _, who in lines}) > 1
    answers = [json.loads(p.read_text()) for p in tmp_path.glob("found-*.json")]
    assert len(answers) == 3 and all(list(a) == list(TASKS) for a in answers)
    assert all(a == {f"n{i}": {"square": i * i} for i in range(8)} for a in answers)
    assert not (tmp_path / "tasks").exists()  # the last cleared up


def test_what_a_killed_process_had_taken_is_free(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stuck = started(tmp_path, log, 2)
    until(lambda: log.is_file() and "2 " in log.read_text())
    other = started(tmp_path, log)
    until(lambda: "7 " in log.read_text())
    assert other.is_alive()  # it waits for the answer of the first
    assert stuck.pid is not None
    os.kill(stuck.pid, signal.SIGKILL)
    other.join(600)
    assert other.exitcode == 0 and not (tmp_path / "tasks").exists()
    taken = [int(line.split()[0]) for line in log.read_text().splitlines()]
    assert sorted(taken) == [0, 1, 2, 2, 3, 4, 5, 6, 7]


def test_a_claim_is_of_one(tmp_path: Path) -> None:
    path = tmp_path / "n.claim"
    with claimed(path) as first:
        with claimed(path) as second:
            assert first and not second
        assert path.exists()  # the loser does not clear up
    assert not path.exists()
    with pytest.raises(KeyError), claimed(path):
        raise KeyError
    with claimed(path) as again:
        assert again


def test_a_folder_is_of_one_request(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "tasks"
    with pytest.raises(InvalidArgument, match="nothing was begun"):
        Shared(folder, {"seed": 0}, "resume")
    Shared(folder, {"seed": 0, "methods": ("a",)}, "new").file.close()
    Shared(folder, {"seed": 0, "methods": ("a",)}, "resume").file.close()
    for how in ("resume", "join"):
        with pytest.raises(InvalidArgument, match=r"seed=0, not 1"):
            Shared(folder, {"seed": 1, "methods": ("a",)}, how)
    (folder / "n0.json").write_text("{}")
    Shared(folder, {"seed": 0, "methods": ("a",)}, "join").abandon()
    assert (folder / "n0.json").is_file()
    anew = Shared(folder, {"seed": 1}, "new")
    assert not (folder / "n0.json").exists()
    with pytest.raises(InvalidArgument, match="another process works there"):
        Shared(folder, {"seed": 1}, "new")
    anew.abandon()
    assert not folder.parent.exists()


def test_the_last_who_leaves_clears_up(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    first, second = (Shared(folder, {"seed": 0}, "join") for _ in range(2))
    (folder / "n0.json").write_text("{}")
    first.finish()
    assert (folder / "n0.json").is_file()
    second.finish()
    assert not folder.exists()
