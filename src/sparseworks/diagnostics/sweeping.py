"""Many tasks that know nothing of each other: here one by one, or over the workers of Ray.

What a task found is written as soon as it is there, a file a task; a sweep that was interrupted
goes on with those that have none, and processes that share a folder take different ones (see
`diagnostics.sharing`). Results do not depend on where a task ran: a worker computes with as many
threads, in the same folder and with the same settings of the environment as this process.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparseworks.core.errors import InvalidArgument, MissingDependency, SparseworksError
from sparseworks.diagnostics.sharing import claimed
from sparseworks.io.atomic import atomic_file

__all__ = ["Cluster", "sweep"]

Subject = Callable[..., Mapping[str, Any]]
Done = Callable[[str, Mapping[str, Any]], None]
_LOOK = 0.2  # seconds between looks for the answers of others
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
        folder: of one JSON file a task; those that are there are not computed again, and those
            that another process computes now are waited for. None: nothing is written.
        cluster: that is entered; None: here, in order.
        progress: called with (tasks done, tasks in all, name).

    Returns:
        Name -> answer as JSON has it, in the order of the tasks.
    """
    found: dict[str, dict[str, Any]] = {}

    def told(name: str, answer: dict[str, Any]) -> None:
        found[name] = answer
        if progress is not None:
            progress(len(found), len(tasks), name)

    def done(name: str, answer: Mapping[str, Any]) -> None:
        text = json.dumps(answer, indent=1)
        if folder is not None:
            with atomic_file(folder / f"{name}.json") as file:
                file.write_text(text + "\n")
        told(name, json.loads(text))

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        found.update(_answers(folder, tasks))
    left = {name: arguments for name, arguments in tasks.items() if name not in found}
    if left and cluster is not None:
        cluster.run(make, left, done)
    elif left and folder is None:
        subject = make()
        for name, arguments in left.items():
            done(name, subject(*arguments))
    elif left and folder is not None:
        _in_turn(make, left, folder, done, told)
    return {name: found[name] for name in tasks}


def _answers(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    kept = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(p.read_text()) for name, p in kept.items() if p.is_file()}


def _in_turn(
    make: Callable[[], Subject], left: dict[str, tuple[Any, ...]], folder: Path, done: Done,
    told: Callable[[str, dict[str, Any]], None],
) -> None:  # fmt: skip
    """Here, in order, but for what others that share the folder have taken."""
    subject: Subject | None = None
    while left:
        before = len(left)
        for name, arguments in list(left.items()):
            with claimed(folder / f"{name}.claim") as mine:
                other = _answers(folder, [name])
                if not (mine or other):
                    continue
                if other:
                    told(name, other[name])
                else:
                    subject = make() if subject is None else subject
                    done(name, subject(*arguments))
            del left[name]
        if len(left) == before:
            time.sleep(_LOOK)
