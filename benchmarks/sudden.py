"""Writes and commands killed at random (SIGKILL), and what is there afterwards.

*Writes*: a process puts a new version of a file or folder in the place of an old one and is killed:
at a random time, at a random call of sparseworks, or at a random call of the code that puts files
in their place. What is read afterwards is *old*, *new*, or *neither* (which must not be), and
after the next write no half-written file may be *left over*.

*Commands* (`train`, `compare`, `prune --stream`) are killed at random times and resumed until they
end; files must be those, byte for byte, of the command that nobody kills.

Processes are forked from one that has everything loaded: kills hit the work, not imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sparseworks as sw
from forking import forked
from written import Format

__all__ = ["COMMANDS", "commands", "writes"]

PACKAGE = str(Path(sw.__file__).parent)
PLACING = str(Path(PACKAGE) / "io" / "atomic.py")
WAYS = ("time", "call", "placing")


def killed(child: int, seconds: float) -> bool:
    """Whether a process that is killed after so many seconds was still at work."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                raise SystemExit(f"a process ended with {os.WEXITSTATUS(status)} by itself")
            return os.WIFSIGNALED(status)
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.0002)


def at_call(work: Callable[[], Any], number: int, where: str) -> Callable[[], None]:
    """The work, killed at a call (of C too) that code below `where` makes."""

    def run() -> None:
        seen = 0

        def look(frame: Any, event: str, argument: Any) -> None:
            nonlocal seen
            if event.endswith("call") and frame.f_code.co_filename.startswith(where):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(look)
        work()
        sys.setprofile(None)

    return run


def calls_of(work: Callable[[], Any], where: str) -> int:
    """Calls that code below `where` makes."""
    seen = 0

    def look(frame: Any, event: str, argument: Any) -> None:
        nonlocal seen
        seen += event.endswith("call") and frame.f_code.co_filename.startswith(where)

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


def writes(name: str, format: Format, count: int, seed: int) -> dict[str, Any]:
    """Counts over so many kills of a write."""
    draw, counts, bad = random.Random(f"{seed} {name}"), Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="sudden-") as folder:
        path = Path(folder) / format.name

        def new() -> None:
            format.write(path, 1)

        new()
        later = format.read(path)
        calls = {"call": calls_of(new, PACKAGE), "placing": calls_of(new, PLACING)}
        format.write(path, 0)
        before = format.read(path)
        began = time.monotonic()
        killed(forked(new), 60)
        seconds = time.monotonic() - began
        for number in range(count):
            format.write(path, 0)
            counts["left over"] += len(list(Path(folder).iterdir())) - 1
            way = WAYS[number % len(WAYS)]
            if way == "time":
                hit = killed(forked(new), draw.random() * seconds)
            else:
                where = PACKAGE if way == "call" else PLACING
                hit = killed(forked(at_call(new, draw.randint(1, calls[way]), where)), 60)
            counts["killed"] += hit
            try:
                found = format.read(path)
                state = "new" if found == later else "old" if found == before else "neither"
            except Exception as error:
                state, found = "neither", f"{type(error).__name__}: {error}"
            counts[state] += 1
            if state == "neither":
                bad.append({"write": number, "way": way, "message": str(found)[:300]})
                shutil.rmtree(path, ignore_errors=True)
        format.write(path, 0)
        counts["left over"] += len(list(Path(folder).iterdir())) - 1
    kinds = ("killed", "old", "new", "neither", "left over")
    found = {k: counts[k] for k in kinds}
    return {"format": name, "writes": count, **found, "first that must not be": bad[:5]}


@dataclass(frozen=True)
class Command:
    """A command that can be resumed.

    Args:
        words: `(work, out)`: its arguments when it begins.
        again: `(words, out)`: its arguments when it goes on.
        begun: a file of the output folder that is there once there is something to go on with.
        wanted: files (name patterns) that must be the same, but for times in JSON.
    """

    words: Callable[[Path, Path], list[str]]
    again: Callable[[list[str], Path], list[str]]
    begun: str
    wanted: tuple[str, ...]


NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                         nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10))

def score(model):
    with torch.no_grad():
        return float(model(torch.linspace(-1, 1, 128).view(2, 1, 8, 8)).abs().mean())

def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (2, 16), generator=generator) for _ in range(4)]
"""


def _resumed(words: list[str], out: Path) -> list[str]:
    return [*words, "--resume"]


COMMANDS: dict[str, Command] = {
    "train": Command(
        lambda work, out: [
            "train", f"{work / 'net.py'}:make", "--data", "digits", "--samples", "512",
            "--batch-size", "32", "--epochs", "4", "--no-augment", "--no-tensorboard", "--method",
            "rigl", "--sparsity", "0.8", "--option", "every=3", "--save-every", "5", "--out",
            str(out)],
        lambda words, out: ["train", "--resume", "--out", str(out)],
        "options.json", ("*.safetensors",),
    ),
    "compare": Command(
        lambda work, out: [
            "compare", f"{work / 'net.py'}:make", "--methods", "magnitude", "wanda", "sparsegpt",
            "--sparsities", "0.3", "0.5", "0.7", "0.8", "--data", "digits", "--metric",
            f"{work / 'net.py'}:score", "--json", "--out", str(out)],
        _resumed, "tasks", ("compare.json",),
    ),
    "prune --stream": Command(
        lambda work, out: [
            "prune", str(work / "model"), "--method", "sparsegpt", "--sparsity", "0.5", "--data",
            f"{work / 'net.py'}:texts", "--stream", "--spill", "--json", "--shard-size", "50KB",
            "--out", str(out)],
        _resumed, "checkpoint.part/journal.jsonl", ("checkpoint/**/*.*",),
    ),
}  # fmt: skip


def make(work: Path) -> None:
    """What the commands work on."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    (work / "net.py").write_text(NET)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(work / "model", max_shard_size="40KB")


def contents(out: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """Hashes by name; of JSON without times."""
    found = {}
    for pattern in patterns:
        for file in sorted(p for p in out.glob(pattern) if p.is_file()):
            data = file.read_bytes()
            if pattern == "compare.json":
                data = json.dumps(without_times(json.loads(data)), sort_keys=True).encode()
            found[str(file.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found


def without_times(value: Any) -> Any:
    aside = ("seconds", "command", "options", "date", "time", "out", "resume")
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in aside}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def commands(name: str, count: int, seed: int) -> dict[str, Any]:
    """A command killed so many times in all, begun anew whenever it ends."""
    from sparseworks.cli import main

    command, draw = COMMANDS[name], random.Random(f"{seed} {name}")
    kills = ends = resumes = differ = 0
    with tempfile.TemporaryDirectory(prefix="sudden-") as folder:
        work, out = Path(folder), Path(folder) / "out"
        make(work)
        words, began = command.words(work, out), time.monotonic()
        if killed(forked(lambda: main(words)), 600):
            raise SystemExit(f"{name} did not end")
        seconds = time.monotonic() - began
        wanted = contents(out, command.wanted)
        if not wanted:
            raise SystemExit(f"{name} wrote none of {command.wanted}")
        shutil.rmtree(out)
        while True:
            begun = (out / command.begun).exists()
            if not begun:
                shutil.rmtree(out, ignore_errors=True)
            now = command.again(words, out) if begun else words
            resumes += begun
            limit = draw.random() * seconds if kills < count else 600.0
            if killed(forked(lambda now=now: main(now)), limit):
                kills += 1
                continue
            ends += 1
            differ += contents(out, command.wanted) != wanted
            shutil.rmtree(out)
            if kills >= count:
                break
    return {"command": name, "kills": kills, "resumed": resumes, "ended": ends,
            "files": len(wanted), "ended with other files": differ,
            "seconds undisturbed": round(seconds, 2)}  # fmt: skip
