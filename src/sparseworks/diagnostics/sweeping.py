"""Many tasks that know nothing of each other: here one by one, or over the workers of Ray.

What a task found is written as soon as it is there, a file a task; a sweep that was interrupted
goes on with those that have none. Results do not depend on where a task ran: a worker computes with
as many threads, in the same folder and with the same settings of the environment as this process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparseworks.core.errors import InvalidArgument, MissingDependency, SparseworksError
from sparseworks.io.atomic import atomic_file

__all__ = ["Cluster", "abandon", "begin", "finish", "sweep"]

Subject = Callable[..., Mapping[str, Any]]
Done = Callable[[str, Mapping[str, Any]], None]
_ASKED = "asked.json"
_KEPT = ("SPARSEWORKS_", "HF_", "TRANSFORMERS_", "TOKENIZERS_")


class Cluster:
    """Ray, joined while this is entered: the cluster of RAY_ADDRESS, one that runs on this machine,
    else all processors of this machine.

    Raises:
        MissingDependency: ray is not installed.
        InvalidArgument: no machine of it has as many processors as torch uses threads here.
    """

    def __enter__(self) -> Cluster:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError:
            raise MissingDependency("sweeps over Ray: pip install 'sparseworks[ray]'") from None
        self.ray = ray
        self.joined = not ray.is_initialized()
        if self.joined:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        self.threads = torch.get_num_threads()
        sizes = [n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]]
        self.slots = sum(int(s // self.threads) for s in sizes)
        if self.slots < 1:
            self.__exit__()
            raise InvalidArgument(
                f"torch uses {self.threads} threads here, more than any machine of the cluster has "
                f"processors ({max(sizes, default=0):g}); set OMP_NUM_THREADS"
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.joined:
            self.ray.shutdown()

    def run(
        self, make: Callable[[], Subject], tasks: Mapping[str, tuple[Any, ...]], done: Done
    ) -> None:
        """Spread tasks over workers, each of which makes its subject once.

        Raises:
            SparseworksError: what a task raised; tasks that are done were told of.
        """
        remote = self.ray.remote(num_cpus=self.threads)(_Worker)
        settings = {k: v for k, v in os.environ.items() if k.startswith(_KEPT)}
        count = min(self.slots, len(tasks))
        workers = [remote.remote(make, self.threads, os.getcwd(), settings) for _ in range(count)]
        waiting = list(tasks.items())[::-1]
        running: dict[Any, tuple[str, Any]] = {}

        def give(worker: Any) -> None:
            if waiting:
                name, arguments = waiting.pop()
                running[worker.run.remote(*arguments)] = name, worker
            else:  # another sweep may wait for its processors
                self.ray.kill(worker)

        try:
            for worker in workers:
                give(worker)
            while running:
                [ready], _ = self.ray.wait(list(running))
                name, worker = running.pop(ready)
                try:
                    done(name, self.ray.get(ready))
                except self.ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, SparseworksError):
                        raise error.cause from None
                    raise
                give(worker)
        finally:
            for worker in workers:
                self.ray.kill(worker)


class _Worker:
    """What a process of the cluster keeps between tasks."""

    def __init__(self, make: Callable[[], Subject], threads: int, folder: str,
                 settings: Mapping[str, str]) -> None:  # fmt: skip
        os.environ.update(settings)
        if os.path.isdir(folder):  # names of files are meant from there
            os.chdir(folder)
        torch.set_num_threads(threads)
        self.make = make
        self.subject: Subject | None = None

    def run(self, *arguments: Any) -> dict[str, Any]:
        if self.subject is None:
            self.subject = self.make()
        return dict(self.subject(*arguments))


def sweep(
    make: Callable[[], Subject],
    tasks: Mapping[str, tuple[Any, ...]],
    *,
    folder: Path | None = None,
    cluster: Cluster | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """What a subject answers to every task.

    Args:
        make: the subject; called once, or once by every worker (it is pickled for them), and only
            where a task is left.
        tasks: name -> arguments of the call of the subject. A name is one of a file.
        folder: of one JSON file a task; those that are there are not computed again. None: nothing
            is written.
        cluster: that is entered; None: here, in order.
        progress: called with (tasks done, tasks in all, name).

    Returns:
        Name -> answer as JSON has it, in the order of the tasks.
    """
    found: dict[str, dict[str, Any]] = {}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: folder / f"{name}.json" for name in tasks}
        found = {name: json.loads(p.read_text()) for name, p in kept.items() if p.is_file()}
    left = {name: arguments for name, arguments in tasks.items() if name not in found}

    def done(name: str, answer: Mapping[str, Any]) -> None:
        text = json.dumps(answer, indent=1)
        if folder is not None:
            with atomic_file(folder / f"{name}.json") as file:
                file.write_text(text + "\n")
        found[name] = json.loads(text)
        if progress is not None:
            progress(len(found), len(tasks), name)

    if left and cluster is not None:
        cluster.run(make, left, done)
    elif left:
        subject = make()
        for name, arguments in left.items():
            done(name, subject(*arguments))
    return {name: found[name] for name in tasks}


def begin(folder: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
    """Make the folder of a sweep's tasks, or take it up.

    Args:
        folder: what another sweep left there goes, unless it is taken up.
        asked: what its tasks follow from, as JSON values.
        resume: go on where it was left.

    Raises:
        InvalidArgument: nothing was begun there, or something else was.
    """
    note = folder / _ASKED
    asked = json.loads(json.dumps(asked))
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with atomic_file(note) as file:
            file.write_text(json.dumps(asked, indent=1) + "\n")
        return
    if not note.is_file():
        raise InvalidArgument(f"{folder}: nothing was begun there; leave --resume out")
    before = json.loads(note.read_text())
    if odd := [k for k in asked if asked[k] != before.get(k)]:
        raise InvalidArgument(
            f"{folder}: was begun with {odd[0]}={before.get(odd[0])!r}, not {asked[odd[0]]!r}; go "
            "on with the same options, or start anew"
        )


def finish(folder: Path) -> None:
    """After the last answer was put where it belongs: the folder of the tasks is not needed."""
    shutil.rmtree(folder)


def abandon(folder: Path) -> None:
    """After an error: a folder that holds no answer goes, with the one around it where that is
    empty then."""
    if [p.name for p in folder.iterdir()] == [_ASKED]:
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
